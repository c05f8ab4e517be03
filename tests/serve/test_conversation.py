"""Tests a conversation over a fake engine with fixed answers."""

import numpy as np
import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.conversation import Conversation
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.scheduler import Scheduler

LENGTH = 400
STOP = -7
SAID = "é, 1, 2, 3"


class Rehearsed:
    """A fake engine: one row gives the same ids to every prompt; `asked` records the prompts."""

    rows, length, vocabulary = 1, LENGTH, 256

    def __init__(self, ids):
        self.ids, self.stop_ids = ids, frozenset([STOP])
        self.asked, self.open = [], False

    def enter(self, row, prompt, adapter, settings):
        assert not self.open
        self.asked.append((list(prompt), adapter))
        self.open, self.left = True, [*self.ids, *[STOP] * 50]
        return self.left.pop(0)

    def advance(self, steps):
        drawn, self.left = self.left[:steps], self.left[steps:]
        return np.array([drawn], np.int32)

    def leave(self, row):
        self.open = False


@pytest.fixture
def engine(text):
    return Rehearsed(text.encode(SAID))


@pytest.fixture
def talk(text, engine):
    def begin(most=100, system=None):
        scheduler = Scheduler(engine, text.decode, base="base", slots=0, waiting=0, burst=1)
        settings = SamplingSettings(0.0, 1.0, 0)
        return Conversation(
            scheduler, text, length=LENGTH, settings=settings, most=most, system=system
        )

    return begin


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def test_every_turn_brings_the_whole_conversation(text, engine, talk):
    conversation, pieces = talk(system="Be brief."), []
    answers = [conversation.ask(q, "base", pieces.append) for q in ("One?", "Two?")]
    assert "".join(pieces) == SAID * 2
    assert all("�" not in piece for piece in pieces)
    assert [(a.text, a.finish, a.tokens) for a in answers] == [(SAID, "stop", 12)] * 2
    system = [{"role": "system", "content": "Be brief."}]
    whole = [*system, *turns("One?", SAID, "Two?")]
    expected = [text.encode(text.render(m, True)) for m in (whole[:2], whole)]
    assert [prompt for prompt, _ in engine.asked] == expected
    assert [a.prompt_tokens for a in answers] == [len(ids) for ids in expected]
    conversation.system = None
    conversation.ask("Three?", "base", pieces.append)
    last = text.encode(text.render(turns("One?", SAID, "Two?", SAID, "Three?"), True))
    assert engine.asked[-1][0] == last


def test_a_stopped_answer_stays_as_far_as_it_was_shown(engine, talk):
    conversation, pieces = talk(), []
    stopped = conversation.ask("One?", "base", pieces.append, lambda: len("".join(pieces)) >= 5)
    assert stopped.finish == "interrupted"
    assert stopped.text == "".join(pieces) == SAID[:5]
    assert not engine.open
    assert conversation.messages == turns("One?", SAID[:5])


def test_half_a_character_is_neither_shown_nor_kept(engine, talk):
    conversation, steps = talk(most=1), []
    cut = conversation.ask("One?", "base", steps.append)
    assert (cut.finish, cut.text) == ("length", "�")  # the limit ends it within a character
    conversation, steps = talk(), []
    looks = iter([False, True])
    stopped = conversation.ask("One?", "base", steps.append, lambda: next(looks))
    assert (stopped.text, steps) == ("é", ["é"])


def test_an_answer_that_did_not_begin_leaves_no_turn(engine, talk):
    conversation = talk()
    stopped = conversation.ask("One?", "base", pytest.fail, lambda: True)
    assert (stopped.text, stopped.finish, stopped.tokens) == ("", "interrupted", 0)
    assert conversation.messages == []
    assert conversation.ask("Two?", "base", lambda text: None).text == SAID


def test_nothing_is_cut_without_a_word(engine, talk, text):
    empty = len(text.encode(text.render(turns(""), True)))
    conversation = talk(most=100)
    assert conversation.ask("a" * 50, "base", lambda text: None).finish == "stop"
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"has 4\d\d tokens .* can have 400; enter /reset"):
        conversation.ask("a" * 300, "base", pytest.fail)
    assert conversation.messages == before
    conversation.reset()
    room = 6
    full = conversation.ask("a" * (LENGTH - empty - room), "base", lambda text: None)
    assert (full.finish, full.tokens) == ("full", room)
    conversation.reset()
    conversation = talk(most=room)
    assert conversation.ask("a", "base", lambda text: None).finish == "length"
