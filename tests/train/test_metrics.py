import json
import math
import os
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from qlora_jax.runtime.errors import UserError
from qlora_jax.train.metrics import MetricsLog, read_metrics


def write(run_dir, steps, start_step=0, offset=0.0):
    with MetricsLog(run_dir, start_step=start_step) as log:
        for step in steps:
            log.write(step, {"train/loss": step + offset})


def events(run_dir):
    """Reads every event under run_dir/tensorboard; decodes only the TFRecord format."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=os.path.getmtime):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(run_dir):
    return [(v.tag, e.step, v.simple_value) for e in events(run_dir) for v in e.summary.value]


def test_a_line_is_one_json_object(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(1, {"train/loss": jnp.float32(0.5), "train/tokens_per_s": np.int64(800)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"step": 1, "train/loss": 0.5, "train/tokens_per_s": 800}


def test_what_is_not_finite_stays_standard_json(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 1}
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["a"])
    assert read["d"] == 1


def test_tensorboard_gets_the_same_scalars(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(0, {"eval/loss": 3.0, "eval/perplexity": 20.0})
        log.write(1, {"train/loss": 2.5})
    assert scalars(tmp_path) == [
        ("eval/loss", 0, 3.0),
        ("eval/perplexity", 0, 20.0),
        ("train/loss", 1, 2.5),
    ]


def test_resuming_drops_the_steps_that_run_again(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 8), start_step=3, offset=0.5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["train/loss"]) for r in rows] == [
        *((1, 1.0), (2, 2.0), (3, 3.0)),
        *((4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)),
    ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_resuming_tells_tensorboard_to_purge(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 8), start_step=3)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [0, 4]
    assert len(scalars(tmp_path)) == 9


def test_resuming_at_the_end_drops_nothing(tmp_path):
    write(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, [], start_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("start_step", [0, 2])
def test_an_evaluation_repeated_at_the_step_resumed_from_replaces_the_old_one(tmp_path, start_step):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(start_step, {"train/loss": 1.0})
        log.write(start_step, {"eval/loss": 2.0})
    with MetricsLog(tmp_path, start_step=start_step) as log:
        log.write(start_step, {"eval/loss": 3.0})
        log.write(start_step + 1, {"train/loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": start_step, "train/loss": 1.0},
        {"step": start_step, "eval/loss": 3.0},
        {"step": start_step + 1, "train/loss": 0.5},
    ]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_half_written_last_line_is_left_out_and_then_dropped(tmp_path, cut):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    write(tmp_path, [3, 4], start_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_last_line_without_its_end_of_line_is_whole(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [3], start_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_killed_process_loses_no_line(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from qlora_jax.train.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], start_step=0)\n"
        "for step in range(1, 101): log.write(step, {'train/loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 101))


@pytest.mark.parametrize("bad", ["{", "[1]", '{"train/loss": 1}', '{"step": "x"}'])
def test_a_malformed_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl:2: "):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: "):
        MetricsLog(tmp_path, start_step=1)
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_missing_run_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/none: no such folder"):
        MetricsLog(tmp_path / "none", start_step=0)


def test_a_disk_that_takes_no_more_ends_the_run_with_its_lines_kept(tmp_path):
    script = (
        "import resource, sys\n"
        "from qlora_jax.runtime.errors import UserError\n"
        "from qlora_jax.train.metrics import MetricsLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with MetricsLog(sys.argv[1], start_step=0) as log:\n"
        "        for step in range(1, 1001): log.write(step, {'train/loss': step})\n"
        "except UserError as e: print(e)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith(f"{tmp_path}: a file grew past a size limit")
    assert result.stderr == ""
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50


def test_torch_is_not_imported_for_the_event_files(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "-c", "import qlora_jax.train.metrics"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda lines: lines, []),
        (lambda lines: lines[:2], [3]),
        (lambda lines: lines[1:], [1]),
        (lambda lines: [], [1, 2, 3]),
    ],
)
def test_steps_without_a_line_are_known(tmp_path, change, lost):
    write(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with MetricsLog(tmp_path, start_step=3) as log:
        assert log.lost == lost
    path.unlink()
    with MetricsLog(tmp_path, start_step=3) as log:
        assert log.lost == [1, 2, 3]
