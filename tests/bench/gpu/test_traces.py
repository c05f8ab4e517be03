"""Tests which events of a trace belong to the device, and their sums."""

import time
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.bench.gpu import record, traces
from qlora_jax.bench.gpu.lane import FULL, PartContext


def named(pid: int, tid: int, process: str, thread: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}},
    ]


def ran(pid: int, tid: int, name: str, start: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": length}


HOST = [*named(1, 1, "/host:CPU", "tf_XLAEigen/1"), ran(1, 1, "on the host", 0, 99)]
GPU = [
    *named(2, 1, "/device:GPU:0", "Stream #13(Compute)"),
    *named(2, 2, "/device:GPU:0", "XLA Ops"),
    ran(2, 1, "gemm", 30, 5),
    ran(2, 1, "decode", 10, 10),
    ran(2, 1, "decode", 15, 10),
    ran(2, 2, "a summary of the same", 10, 25),
]


def test_a_gpus_streams_alone_count() -> None:
    events = traces.device_events({"traceEvents": HOST + GPU})
    assert [(e.name, e.start) for e in events] == [("decode", 10), ("decode", 15), ("gemm", 30)]
    assert [e.name for e in traces.device_events({"traceEvents": HOST})] == ["on the host"]


def test_what_runs_at_the_same_time_is_busy_once(tmp_path: Path) -> None:
    lane = PartContext(record.Recorder(tmp_path / "a", "traces"), FULL, time.monotonic() + 9)
    traces.summarize(lane, "step", traces.device_events({"traceEvents": GPU}))
    rows = {line["name"]: line for line in record.read([tmp_path / "a"])}
    assert rows["step: busy"]["value"] == 15 + 5
    assert rows["step: span"]["value"] == 25
    assert rows["step: kernels"]["value"] == 3
    assert rows["step: busy"]["top"] == [["decode", 20, 2], ["gemm", 5, 1]]
    with pytest.raises(ValueError, match="no event"):
        traces.summarize(lane, "step", [])
