"""Conversations under published chat templates: right, or refused in a line that is known.

`make chats` prints the counts and draws them; a case here is a square of the picture.
"""

from collections.abc import Sequence

import pytest
from pairs import REASON

pytest.importorskip("trl", reason=REASON)

from chats import report
from chats.judge import REFUSED, WRONG, Outcome

pytestmark = pytest.mark.parity
KNOWN = {("gptoss", "empty answer")}
"""Refused: a middle answer's end is told from its content there."""


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
