import builtins
import io
import re
import sys
import types

import pytest
from rich.console import Console

from qlora_jax.runtime.display import (
    NOTEBOOK_SECONDS,
    PLAIN_SECONDS,
    TrainDisplay,
    counted,
    duration,
    progress,
)
from qlora_jax.runtime.notebook import in_notebook


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def plain():
    return Console(file=io.StringIO(), width=40)


def terminal():
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then_and_the_last(clock):
    console = plain()
    with TrainDisplay(100, console=console, clock=clock) as display:
        for step in range(1, 101):
            clock.now += 1.0
            display.update(step, loss=2.0, tokens_per_s=1234.4)
    shown = lines(console)
    assert shown[0] == "training  0/100  0:00  compiling the first step"
    steps = [int(re.search(r"(\d+)/100", line)[1]) for line in shown]
    assert steps == list(range(0, 101, int(PLAIN_SECONDS)))
    assert shown[2] == "training  20/100  0:20  loss 2.0000  1,234 tokens/s  ETA 1:20"
    assert "ETA" not in shown[-1]


def test_the_last_step_is_shown_once_however_soon_it_comes(clock):
    console = plain()
    with TrainDisplay(3, console=console, clock=clock) as display:
        for step in (1, 2, 3):
            display.update(step, loss=1.0, tokens_per_s=1.0)
    assert [line[:13] for line in lines(console)] == ["training  0/3", "training  3/3"]


def test_the_time_left_leaves_compilation_and_earlier_sessions_out(clock):
    console = plain()
    with TrainDisplay(60, start=50, console=console, clock=clock) as display:
        clock.now = 100.0
        display.update(51, loss=1.0, tokens_per_s=1.0)
        clock.now = 120.0
        display.update(52, loss=1.0, tokens_per_s=1.0)
    assert lines(console)[0].startswith("training  50/60")
    assert lines(console)[1].endswith("ETA -:--")
    assert lines(console)[2].endswith("ETA 2:40")


def test_an_interrupted_run_shows_how_far_it_came(clock):
    console = plain()
    display = TrainDisplay(9, console=console, clock=clock)
    with pytest.raises(KeyboardInterrupt), display:  # noqa: PT012
        display.update(4, loss=1.0, tokens_per_s=1.0)
        raise KeyboardInterrupt
    assert lines(console)[-1].startswith("training  4/9")


def test_a_terminal_gets_a_bar(clock):
    console = terminal()
    with TrainDisplay(8, console=console, clock=clock) as display:
        display.update(1, loss=3.25, tokens_per_s=10.0)
        clock.now = 2.0
        display.update(2, loss=2.125, tokens_per_s=1500.0)
        display.note("checkpoint [saved]")
    text = console.file.getvalue()
    assert "checkpoint [saved]" in text
    last = text[text.rindex("training") :]
    assert "2/8" in last
    assert "loss 2.1250  1,500 tokens/s  ETA 0:12" in last


@pytest.fixture
def cell(monkeypatch):
    """Fakes a notebook cell; each display has a handle with the texts that it showed."""
    places = []

    class Handle:
        def __init__(self, first):
            self.texts = [first]

        def update(self, data, *, raw):
            assert raw
            self.texts.append(data["text/plain"])

    def display(data, *, raw, display_id):
        assert raw
        assert display_id is True
        places.append(Handle(data["text/plain"]))
        return places[-1]

    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return places


def test_a_notebook_gets_one_text_that_changes(clock, cell, capsys):
    console = Console(file=io.StringIO(), force_jupyter=True)
    with TrainDisplay(10_000, console=console, clock=clock) as display:
        for step in range(1, 10_001):
            clock.now += 1 / 64
            display.update(step, loss=2.0, tokens_per_s=10.0)
            if step == 5_000:
                display.note("step 5000: held-out [loss]\x1b[2J")
    (place,) = cell
    assert place.texts[0] == f"training  {'┈' * 20}  0/10000  0:00  compiling the first step"
    half = next(text for text in place.texts if " 4992/" in text)
    assert half.startswith(f"training  {'━' * 9}{'┈' * 11}  4992/10000  1:18  loss 2.0000")
    assert place.texts[-1].startswith(f"training  {'━' * 20}  10000/10000  2:36")
    assert len(place.texts) <= 10_000 / 64 / NOTEBOOK_SECONDS + 2
    captured = capsys.readouterr()
    assert captured.out == "step 5000: held-out [loss]\\x1b[2J\n"
    assert captured.err == console.file.getvalue() == ""


def test_a_notebook_is_known_by_its_shell(monkeypatch, cell, capsys):
    class ZMQInteractiveShell:
        pass

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    assert in_notebook()
    with progress("evaluating") as advance:
        advance()
    assert [place.texts for place in cell] == [["evaluating  0  0:00", "evaluating  1  0:00"]]
    monkeypatch.undo()
    assert not in_notebook()
    assert capsys.readouterr() == ("", "")


def test_brackets_in_a_note_and_a_description_are_text(clock):
    for console in (plain(), terminal()):
        with TrainDisplay(1, description="a[b]c", console=console, clock=clock) as display:
            display.note("list[int] of a long line that is not to be broken at the width")
        text = console.file.getvalue()
        assert "a[b]c" in text
        assert "list[int] of a long line that is not to be broken at the width" in text


def test_it_goes_to_stderr(capsys):
    with TrainDisplay(1) as display:
        display.update(1, loss=1.0, tokens_per_s=1.0)
    with progress("encoding", 1) as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training  1/1" in captured.err
    assert "encoding  1/1" in captured.err


@pytest.mark.parametrize(("total", "end"), [(3, "loading  3/3  0:04"), (None, "loading  3  0:04")])
def test_other_work_is_counted(clock, total, end):
    console = plain()
    with progress("loading", total, console=console, clock=clock) as advance:
        advance()
        clock.now = 4.0
        advance(2)
    assert lines(console)[-1] == end
    assert len(lines(console)) == 2


def test_work_on_many_items_tells_the_time_left(clock):
    console = plain()
    with counted("compiling", 4, console=console, clock=clock) as advance:
        for _ in range(4):
            clock.now += 30.0
            advance()
    assert lines(console)[:2] == ["compiling  0/4  0:00", "compiling  1/4  0:30  ETA 1:30"]
    assert lines(console)[-1] == "compiling  4/4  2:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03"), (float("nan"), "-:--")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
