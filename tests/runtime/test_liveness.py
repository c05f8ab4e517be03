"""Tests the heartbeats between processes, and how the processes of a run end."""

import os
import subprocess
import sys

import pytest

from experiments.tools.devices import ended, places
from qlora_jax.runtime.liveness import ENDED, FINISHED, GRACE_S, SILENT_S, Heartbeats

PART = """
import sys, time
from qlora_jax.runtime import processes

processes.join()
time.sleep(float(sys.argv[1]))
processes.leave(0)
print("returned")
"""
"""The program of a process that joins a run, works for some seconds and leaves."""


def run_parts(*seconds: int) -> list[tuple[int, str, str]]:
    """Runs a process for each number of seconds; returns exit codes, stdouts and stderrs."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PART, str(work)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for work, place in zip(seconds, places(len(seconds)))
    ]
    return ended(started, timeout=120)


@pytest.mark.parametrize("seconds", [(0, 2), (2, 0)])
def test_a_slow_process_is_waited_for(seconds) -> None:
    """The first process runs the service that the other process needs, so it must end last."""
    (first, printed, err), (other, silent, lost) = run_parts(*seconds)
    assert (first, other) == (0, 0), err + lost
    assert (printed, silent) == ("returned\n", "")


def test_a_process_that_finished_is_not_missed() -> None:
    signs = Heartbeats(index=0, count=3, now=0)
    signs.update({1: FINISHED, 2: "1"}, 1)
    signs.update({1: FINISHED, 2: "2"}, 2 + SILENT_S)
    assert signs.fault(2 + SILENT_S) is None
    assert not signs.finished()
    signs.update({1: FINISHED, 2: FINISHED}, 3 + SILENT_S)
    assert signs.finished()


def test_a_process_that_beats_is_alive() -> None:
    signs = Heartbeats(index=0, count=3, now=0)
    for now in range(100):
        signs.update({0: "0", 1: str(now), 2: str(now // 3)}, now)
        assert signs.fault(now) is None


def test_a_silent_process_is_found() -> None:
    signs = Heartbeats(index=0, count=2, now=0)
    signs.update({1: "7"}, 5)
    signs.update({1: "7"}, 5 + SILENT_S)
    assert signs.fault(5 + SILENT_S) is None
    signs.update({1: "7"}, 6 + SILENT_S)
    assert "process 1 has given no sign of life" in str(signs.fault(6 + SILENT_S))


def test_the_others_have_time_to_end_by_themselves() -> None:
    signs = Heartbeats(index=1, count=2, now=0)
    signs.update({0: "3"}, 1)
    signs.update({0: f"{ENDED}the disk is full"}, 2)
    assert signs.fault(2 + GRACE_S) is None
    assert signs.fault(2.5 + GRACE_S) == "process 0 ended: the disk is full"


def test_a_service_that_does_not_answer_is_found() -> None:
    signs = Heartbeats(index=1, count=2, now=0)
    signs.update({0: "1"}, 3)
    assert signs.fault(3 + SILENT_S) is None
    assert "process 0 has not answered" in str(signs.fault(4 + SILENT_S))
