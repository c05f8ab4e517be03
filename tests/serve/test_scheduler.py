"""Tests the scheduler over a fake engine whose rows count."""

import numpy as np
import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.scheduler import BURST, AnswerPiece, Job, Refused, Scheduler

STOP = 0
GREEDY = SamplingSettings(0.0, 1.0, 0)


class Counting:
    """A fake engine: prompt [n] with adapter k gives 100k + n + 1, 100k + n + 2, ...

    If the prompt has a second id, the stop id replaces every number n with n % 10 == 9.
    """

    def __init__(self, rows=2, length=100):
        self.rows, self.length, self.vocabulary, self.stop_ids = rows, length, 1000, {STOP}
        self.put = []
        self.open = {}
        self.bursts = []

    def put_adapter(self, slot, updates):
        self.put.append((slot, updates))

    def enter(self, row, prompt, adapter, settings):
        assert row not in self.open
        self.open[row] = (self.values(prompt, adapter), adapter)
        return next(self.open[row][0])

    def values(self, prompt, adapter):
        n = prompt[0]
        while True:
            n += 1
            yield STOP if len(prompt) > 1 and n % 10 == 9 else 100 * adapter + n

    def advance(self, steps):
        self.bursts.append((steps, sorted(self.open)))
        drawn = np.full((self.rows, steps), 777, np.int32)
        for row, (values, _) in self.open.items():
            drawn[row] = [next(values) for _ in range(steps)]
        return drawn

    def leave(self, row):
        del self.open[row]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Desk:
    """A scheduler with a fake clock; `told` holds the pieces of each job."""

    def __init__(self, **options):
        self.engine, self.clock = Counting(), Clock()
        self.scheduler = Scheduler(
            self.engine,
            lambda ids: "".join(f"{i} " for i in ids),
            **{"base": "base", "slots": 2, "waiting": 2, "clock": self.clock} | options,
        )
        self.told = {}

    def submit(self, *prompt, model="base", max_tokens=5, **options):
        heard = self.told.setdefault(prompt, [])
        job = Job(
            prompt=prompt,
            model=model,
            max_tokens=max_tokens,
            settings=GREEDY,
            listen=heard.append,
            **options,
        )
        self.scheduler.submit(job)
        return job

    def finish(self):
        steps = 0
        while self.scheduler.busy:
            self.scheduler.step()
            steps += 1
            assert steps < 1000
        return self

    def answer(self, *prompt):
        pieces = self.told[prompt]
        assert all(piece.finish is None for piece in pieces[:-1])
        return "".join(p.text for p in pieces), pieces[-1].tokens, pieces[-1].finish


def expected(start, count, adapter=2):
    return "".join(f"{100 * adapter + start + i} " for i in range(1, count + 1))


@pytest.fixture
def desk():
    return Desk()


@pytest.mark.parametrize("count", [1, 2, BURST, BURST + 1, BURST + 2, 30])
def test_exactly_so_many_tokens(desk, count):
    desk.submit(5, max_tokens=count)
    desk.finish()
    assert desk.answer(5) == (expected(5, count), count, "length")
    assert not desk.engine.open


def test_a_stop_id_counts_and_is_not_shown(desk):
    desk.submit(5, 1, max_tokens=50)
    desk.submit(8, 1)
    desk.finish()
    assert desk.answer(5, 1) == (expected(5, 3), 4, "stop")
    assert desk.answer(8, 1) == ("", 1, "stop")


def test_a_stop_id_as_the_last_token_is_a_stop(desk):
    desk.submit(5, 1, max_tokens=4)
    desk.submit(15, 1, max_tokens=3)
    desk.finish()
    assert desk.answer(5, 1)[1:] == (4, "stop")
    assert desk.answer(15, 1)[1:] == (3, "length")


def test_a_stop_text_ends_the_answer(desk):
    desk.submit(5, max_tokens=50, stop=["8 2"])
    desk.finish()
    assert desk.answer(5) == ("206 207 20", 4, "stop")


def test_rows_are_taken_up_as_they_become_free_while_others_decode(desk):
    desk.submit(1, max_tokens=40)
    desk.submit(2, max_tokens=3)
    desk.scheduler.step()
    desk.submit(3, max_tokens=3)
    desk.finish()
    for n, count in ((1, 40), (2, 3), (3, 3)):
        assert desk.answer(n) == (expected(n, count), count, "length")
    assert [rows for _, rows in desk.engine.bursts[:3]] == [[0, 1], [0, 1], [0]]
    assert all(steps <= BURST for steps, _ in desk.engine.bursts)


def test_first_come_first_served(desk):
    for n in range(4):
        desk.submit(n, max_tokens=BURST + 1)
    desk.scheduler.step()
    assert [bool(desk.told[n,]) for n in range(4)] == [True, True, False, False]
    desk.finish()
    assert all(desk.answer(n)[1] == BURST + 1 for n in range(4))


def test_who_finds_the_queue_full_is_refused(desk):
    for n in range(4):
        desk.submit(n)
    with pytest.raises(Refused, match="4 requests are waiting already") as refused:
        desk.submit(4)
    assert refused.value.reason == "busy"
    desk.scheduler.step()
    desk.finish().submit(4)
    assert desk.finish().answer(4)[2] == "length"


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ((1,), {"model": "other"}, "unknown model"),
        ((1,), {"max_tokens": 100}, "too long"),
        (tuple(range(100)), {"max_tokens": 1}, "too long"),
    ],
)
def test_refusals(desk, prompt, options, reason):
    with pytest.raises(Refused) as refused:
        desk.submit(*prompt, **options)
    assert refused.value.reason == reason
    assert not desk.scheduler.busy
    desk.submit(1, max_tokens=99)
    assert desk.finish().answer(1)[1] == 99


def test_cancelling_frees_the_row_and_says_nothing(desk):
    running, waiting = desk.submit(1, max_tokens=90), None
    desk.submit(2, max_tokens=90)
    desk.scheduler.step()
    waiting = desk.submit(3)
    heard = len(desk.told[1,])
    for job in (running, waiting, running):
        desk.scheduler.cancel(job)
    desk.submit(4)
    desk.scheduler.step()
    assert desk.answer(4)[2] == "length"
    desk.finish()
    assert len(desk.told[1,]) == heard
    assert desk.told[3,] == []
    assert desk.answer(2)[1] == 90


def test_timeouts_end_what_runs_and_what_waits(desk):
    desk.submit(1, max_tokens=90, timeout=5)
    desk.submit(2, max_tokens=90)
    desk.scheduler.step()
    desk.submit(3, timeout=1)
    desk.clock.now = 4.9
    desk.submit(4, timeout=1)
    desk.clock.now = 5.0
    desk.scheduler.step()
    for n in (1, 3):
        assert isinstance(desk.told[n,][-1], Refused)
        assert desk.told[n,][-1].reason == "timeout"
    assert desk.finish().answer(2)[1] == 90
    assert desk.answer(4)[1] == 5


def test_stopping_lets_run_what_runs(desk):
    for n in range(3):
        desk.submit(n, max_tokens=20)
    desk.scheduler.step()
    desk.scheduler.stop()
    assert desk.told[2,][-1].reason == "stopping"
    with pytest.raises(Refused, match="stopping"):
        desk.submit(9)
    desk.finish()
    assert [desk.answer(n)[1] for n in (0, 1)] == [20, 20]


def test_refusing_all_ends_all(desk):
    for n in range(3):
        desk.submit(n, max_tokens=20)
    desk.scheduler.step()
    desk.scheduler.refuse_all(Refused("stopping", "cut"))
    assert not desk.scheduler.busy
    assert not desk.engine.open
    assert all(str(desk.told[n,][-1]) == "cut" for n in range(3))
    assert isinstance(desk.told[0,][0], AnswerPiece)


def test_adapters_have_slots_by_name(desk):
    desk.scheduler.load("a", {"x": 1})
    desk.scheduler.load("b", {"y": 2})
    assert desk.engine.put == [(0, {"x": 1}), (1, {"y": 2})]
    assert desk.scheduler.models == ["base", "a", "b"]
    for n, model in enumerate(["a", "b", "base"]):
        desk.submit(n, model=model)
    desk.finish()
    assert [desk.answer(n)[0] for n in range(3)] == [expected(n, 5, n) for n in range(3)]
    for name in ("a", "base"):
        with pytest.raises(UserError, match=f"'{name}' is loaded already"):
            desk.scheduler.load(name, {})
    with pytest.raises(UserError, match="no room for 'c': all 2 slots for adapters are in use"):
        desk.scheduler.load("c", {})
    with pytest.raises(Refused, match="no adapter 'c' is loaded"):
        desk.scheduler.unload("c")


def test_an_unloaded_adapters_slot_is_kept_until_its_jobs_have_ended(desk):
    desk.scheduler.load("a", {})
    desk.scheduler.load("b", {})
    desk.submit(1, model="a", max_tokens=30)
    desk.scheduler.step()
    desk.scheduler.unload("a")
    with pytest.raises(Refused, match="'a' is not loaded; give one of: base, b"):
        desk.submit(2, model="a")
    with pytest.raises(UserError, match="no room"):
        desk.scheduler.load("c", {})
    assert desk.finish().answer(1)[0] == expected(1, 30, 0)
    desk.scheduler.load("c", {})
    assert desk.engine.put[-1] == (0, {})
    desk.scheduler.unload("b")
    desk.scheduler.load("b", {})
    assert desk.engine.put[-1] == (1, {})
