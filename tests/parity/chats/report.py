"""Judges every conversation under every template and counts the outcomes."""

from collections import Counter
from collections.abc import Sequence

from chats.conversations import CASES
from chats.judge import REFUSED, RIGHT, VERDICTS, WRONG, Outcome, judge
from chats.templates import FAMILIES


def every() -> list[Outcome]:
    """Judges every conversation under every template."""
    return [judge(template, name, case) for template in FAMILIES for name, case in CASES.items()]


def share_refused(outcomes: Sequence[Outcome]) -> float:
    """Returns the fraction that we refuse of the conversations that the template can write."""
    counts = Counter(o.verdict for o in outcomes)
    return counts[REFUSED] / max(1, sum(counts[v] for v in (RIGHT, REFUSED, WRONG)))


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns counts by template, and every case that is refused or wrong."""
    lines = [f"{'':22}" + "".join(f"{v:>10}" for v in VERDICTS)]
    for template in (*dict.fromkeys(o.template for o in outcomes), "all"):
        counts = Counter(o.verdict for o in outcomes if template in (o.template, "all"))
        lines.append(f"{template:22}" + "".join(f"{counts[v]:>10}" for v in VERDICTS))
    lines.append(f"refused: {share_refused(outcomes):.1%} of those that have a text")
    compared = sum(o.compared for o in outcomes)
    lines.append(f"TRL's training templates mark the same answers in the same text: {compared}")
    lines += [
        f"{o.verdict}: {o.template}: {o.case}: {o.detail}"
        for verdict in (REFUSED, WRONG)
        for o in outcomes
        if o.verdict == verdict
    ]
    return "\n".join(lines)
