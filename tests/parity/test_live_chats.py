"""Checks conversations under published chat templates: right, or a known refusal.

The references are transformers' text and TRL's marks. `make chats` prints and draws the counts.
"""

from collections.abc import Sequence

import pytest
from pairs import REASON

pytest.importorskip("trl", reason=REASON)

from chats import report
from chats.judge import REFUSED, WRONG, Outcome

pytestmark = pytest.mark.parity
KNOWN = {("gptoss", "empty answer")}
"""Known refusals: GPT-OSS ends a middle answer differently; we need its content to find the end."""


@pytest.fixture(scope="module")
def outcomes() -> Sequence[Outcome]:
    found = report.every()
    print(report.table(found))
    return found


def test_no_case_is_wrong(outcomes):
    assert not [(o.template, o.case, o.detail) for o in outcomes if o.verdict == WRONG]


def test_what_is_refused_is_known(outcomes):
    assert {(o.template, o.case) for o in outcomes if o.verdict == REFUSED} == KNOWN
    assert report.share_refused(outcomes) <= 0.1


def test_a_peer_marks_the_same_answers(outcomes):
    assert sum(o.compared for o in outcomes) > 150
