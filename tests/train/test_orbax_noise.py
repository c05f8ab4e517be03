"""After an error in orbax, only our own line is printed."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from qlora_jax.train import orbax_noise

MAKE = """
import gc, pathlib, resource, sys
import jax.numpy as jnp
import numpy as np
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.state import TrainState
a = lambda n: {k: jnp.asarray(np.random.default_rng(n).normal(size=(64, 64))) for k in "abcd"} | {
    "runs": {}
}
make = lambda n: TrainState(a(n), ({},), jnp.int32(n), jnp.float32(1), jnp.int32(0))
run = pathlib.Path(sys.argv[1])
checkpoints = Checkpoints(run, 9)
checkpoints.save(make(1), {})
"""
FULL = (
    MAKE
    + """
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
for step in range(2, 6):
    try:
        checkpoints.save(make(step), {})
    except UserError as e:
        print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
checkpoints.save(make(6), {})
"""
)
DAMAGED = (
    MAKE
    + """
for step in range(2, 8):
    checkpoints.save(make(step), {})
    state = run / "checkpoints" / str(step) / "state"
    if step > 4:  # what holds the arrays
        max(state.rglob("*"), key=lambda file: file.is_file() and file.stat().st_size).unlink()
        continue
    file = state / "manifest.ocdbt"
    data = bytearray(file.read_bytes())
    data[len(data) * step // 8] ^= 1
    file.write_bytes(data)
checkpoints.close()
state, _ = Checkpoints(run, 9).restore(make(0), say=print)
assert int(state.step) == 1
gc.collect()
"""
)


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        pytest.param(FULL, 4, id="full", marks=pytest.mark.slow),
        pytest.param(DAMAGED, 6, id="damaged"),
    ],
)
def test_our_lines_alone_are_printed(tmp_path, script, lines):
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == lines


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (ValueError('DATA_LOSS: Error reading "a/0.0" in OCDBT database at local file "b/"'), 0),
        (ValueError("another"), 1),
    ],
)
def test_a_read_that_nobody_waits_for_is_theirs_by_what_it_says(caplog, error, lines):
    orbax_noise.silence()
    logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert len(caplog.records) == lines


@pytest.mark.parametrize(("file", "lines"), [("orbax/serialization.py", 0), ("app.py", 1)])
def test_a_task_that_nobody_ends_is_theirs_by_its_file(caplog, file, lines):
    orbax_noise.silence()
    line = "Task was destroyed but it is pending!\ntask: <Task pending coro=<f() running at /%s:1>>"
    logging.getLogger("asyncio").error(line, file)
    assert len(caplog.records) == lines


@pytest.mark.parametrize(
    ("coroutine", "told"),
    [("async_serialize_from_host.<locals>.write_fragment", 0), ("main", 1)],
)
def test_a_write_that_never_began_is_theirs_by_its_name(monkeypatch, coroutine, told):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        orbax_noise.silence.__wrapped__()
        warnings.warn(f"coroutine '{coroutine}' was never awaited", RuntimeWarning, stacklevel=1)
    assert len(seen) == told
