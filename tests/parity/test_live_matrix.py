"""Checks files of transformers and PEFT over their options: right, or a documented refusal.

The references are the other tools' logits. `make matrix` prints the table of the cases.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from pairs import REASON

for module in ("peft", "bitsandbytes"):
    pytest.importorskip(module, reason=REASON)

from matrix import every, models, report  # noqa: E402
from matrix.judge import NO_MODEL, REFUSALS, REFUSED, RIGHT, WRONG, Outcome  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.quick]

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def outcomes() -> Sequence[Outcome]:
    models.quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [outcome for run in every.sampled().values() for outcome in run()]
    print(report.table(found))
    return found


def test_no_case_is_wrong(outcomes):
    assert not [report.describe(o) for o in outcomes if o.verdict == WRONG]


def test_few_cases_are_refused(outcomes):
    assert report.share_refused(outcomes) <= 0.1


def test_every_refusal_is_of_a_named_kind(outcomes):
    refused = [o for o in outcomes if o.verdict == REFUSED]
    assert not [report.describe(o) for o in refused if o.kind not in REFUSALS]


def test_every_kind_of_refusal_is_met_and_documented(outcomes):
    text = DOCUMENT.read_text("utf-8")
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert rows - {"what is refused"} == REFUSALS.keys()
    assert REFUSALS.keys() == {o.kind for o in outcomes if o.verdict == REFUSED}


def test_most_cases_are_models_and_every_group_has_right_ones(outcomes):
    assert sum(o.verdict == NO_MODEL for o in outcomes) <= 0.15 * len(outcomes)
    groups = {o.group for o in outcomes} - {"functions"}
    assert groups == {o.group for o in outcomes if o.verdict == RIGHT} - {"functions"}
