"""Formats the outcomes as a table with counts, and as JSON."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence

from matrix.judge import NO_MODEL, REFUSED, RIGHT, WRONG, Outcome

VERDICTS = (RIGHT, REFUSED, WRONG, NO_MODEL)


def share_refused(outcomes: Sequence[Outcome]) -> float:
    """Returns the fraction of the models and adapters that we refuse."""
    counts = Counter(o.verdict for o in outcomes)
    return counts[REFUSED] / max(1, sum(counts[v] for v in (RIGHT, REFUSED, WRONG)))


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns counts by group, kinds of refusals, and every wrong or unnamed case, as text."""
    lines = [f"{'':22}" + "".join(f"{v:>10}" for v in VERDICTS)]
    groups = list(dict.fromkeys(o.group for o in outcomes))
    for group in (*groups, "all"):
        counts = Counter(o.verdict for o in outcomes if group in (o.group, "all"))
        lines.append(f"{group:22}" + "".join(f"{counts[v]:>10}" for v in VERDICTS))
    lines.append(f"refused: {share_refused(outcomes):.1%} of those that are models")
    kinds = Counter(o.kind for o in outcomes if o.verdict == REFUSED)
    lines += ["", *(f"{n:>4}  {kind}" for kind, n in kinds.most_common())]
    lines += ["", *(describe(o) for o in outcomes if o.verdict == WRONG)]
    lines += [describe(o) for o in outcomes if o.verdict == REFUSED and o.kind == "not named"]
    return "\n".join(lines)


def describe(outcome: Outcome) -> str:
    """Returns one outcome as one line."""
    what = f"{outcome.kind} {outcome.detail}".strip() or f"{outcome.off:.1e}"
    return f"{outcome.verdict}: {outcome.group}: {outcome.case}: {what}"


def as_json(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes as a JSON list; a missing difference is null."""
    rows = [dataclasses.asdict(o) for o in outcomes]
    rows = [row | {"off": None if math.isnan(row["off"]) else row["off"]} for row in rows]
    return json.dumps(rows, indent=1)
