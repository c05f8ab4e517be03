import errno
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from qlora_jax.config import OptimizerConfig
from qlora_jax.lora.variables import Vector, Weight
from qlora_jax.models.trees import flatten
from qlora_jax.runtime import format_version
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.checkpoint import FOLDER, Checkpoints
from qlora_jax.train.moments import ENCODERS
from qlora_jax.train.offload import ON_HOST
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import TrainState, init_state

EXTRA = {
    "loader": {"epoch": 3, "step": 1, "fingerprint": "ab12"},
    "seed": 2**40,
    "progress": {"seconds": 0.1 + 0.2, "eval_before": None, "answers": ['é "x"\n', ""], "ok": True},
}


def dropped_by_orbax(test):
    """Ignores the warnings of the other reads and writes, which orbax drops after an error."""
    for kind in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{kind}")(test)
    return test


def make(step, seed=0, columns=4, **more):
    random = np.random.default_rng([seed, step])

    def array(dtype, *shape):
        return jnp.asarray(random.normal(size=shape) * 100, dtype)

    trained = {
        "a": array(jnp.float32, 3, columns),
        "b": array(jnp.bfloat16, 5),
        "c": array(jnp.float16, 2, 2),
        "runs": {"0": {"w": array(jnp.float32, 2, columns)}},
        **more,
    }
    # one entry for the group outside the layers, then one for each of the two layers
    optimizer = tuple(
        {"mu": array(jnp.float32, rows, columns), "count": jnp.int32(step)} for rows in (3, 1, 1)
    )
    return TrainState(
        trained, optimizer, jnp.int32(step), jnp.float32(2.0**15), jnp.asarray(step + 3, jnp.int32)
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, x in flatten(expected).items():
        y = flatten(found)[path]
        assert y.dtype == x.dtype
        assert np.asarray(y).tobytes() == np.asarray(x).tobytes(), path


def test_moments_may_come_back_to_another_memory(tmp_path) -> None:
    with_host = make(3)._replace(optimizer=ON_HOST.store(make(3).optimizer))
    for kept, like in ((make(3), with_host), (with_host, make(5))):
        shutil.rmtree(tmp_path / FOLDER, ignore_errors=True)
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(kept, EXTRA)
        state, _ = checkpoints.restore(like)
        checkpoints.close()
        assert_same(state, make(3))
        for ours, theirs in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(like.optimizer)):
            assert ours.sharding.memory_kind == theirs.sharding.memory_kind


def steps(run_dir):
    return sorted(int(name) for name in os.listdir(run_dir / FOLDER) if name.isdigit())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of a run directory, open for writing, with a checkpoint of step 3."""
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(make(3), EXTRA)
    return checkpoints


def test_what_is_saved_comes_back_to_the_bit(tmp_path, saved):
    state, extra = Checkpoints(tmp_path, 2).restore(make(0, seed=1))
    assert_same(state, make(3))
    assert extra == EXTRA
    assert extra["progress"]["seconds"].hex() == (0.1 + 0.2).hex()


def test_the_newest_are_kept(tmp_path, saved):
    for step in (5, 8, 11):
        saved.save(make(step), {"step": step})
    assert steps(tmp_path) == [8, 11]
    assert saved.latest() == 11
    for step in (8, 11):
        state, extra = saved.restore(make(0), step)
        assert_same(state, make(step))
        assert extra == {"step": step}
    assert_same(saved.restore(make(0))[0], make(11))


def test_one_stays_beside_the_newest_until_another_does(tmp_path, saved):
    for step in (5, 8, 11):
        saved.save(make(step), {"step": step}, best=3)
    assert steps(tmp_path) == saved.steps() == [3, 8, 11]
    assert_same(saved.restore(make(0), 3)[0], make(3))
    saved.save(make(14), {"step": 14}, best=11)
    assert steps(tmp_path) == [11, 14]
    assert saved.extra() == {"step": 14}


def test_one_that_a_kill_left_goes_with_the_next(tmp_path, saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "delete", lambda *_: None)
        for step in (5, 8):
            saved.save(make(step), {})
    assert steps(tmp_path) == [3, 5, 8]
    Checkpoints(tmp_path, 2).save(make(11), {})
    assert steps(tmp_path) == [8, 11]


def test_saving_the_same_step_again_keeps_the_first(saved):
    saved.save(make(3, seed=9), {})
    assert_same(saved.restore(make(0))[0], make(3))


def test_the_state_may_be_used_while_more_is_saved(tmp_path, saved):
    state = make(4)
    saved.save(state, {})
    jax.tree.map(lambda x: x.delete(), state)
    assert_same(saved.restore(make(0))[0], make(4))


def test_an_empty_folder_has_none(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest() is None
    assert checkpoints.latest_text() == "there is no checkpoint yet"
    with pytest.raises(UserError, match=f"^{tmp_path / FOLDER}: no checkpoint in it; train"):
        checkpoints.restore(make(0))


@pytest.mark.parametrize(
    "like",
    [
        make(0, columns=5),
        make(0, d=jnp.zeros(3)),
        make(0)._replace(trained={"a": jnp.zeros((3, 4)), "runs": {}}),
        make(0)._replace(trained=OrderedDict(x=jnp.zeros((3, 4)), runs={})),
    ],
    ids=["shape", "more", "fewer", "names"],
)
def test_another_models_state_is_refused(tmp_path, saved, like):
    with pytest.raises(UserError, match=f"^{tmp_path / FOLDER}/3: does not hold this run's") as e:
        saved.restore(like)
    assert "\n" not in str(e.value)
    assert "optimizer" not in str(e.value)


def train(moments, steps, state=None):
    """Updates a weight of 4160 elements, enough for 8-bit moments, and a bias that is too small."""
    optimizer = adamw(OptimizerConfig(moments=moments), 10)
    if state is None:
        trained = {"weight": Weight(jnp.ones((65, 64))), "bias": Vector(jnp.ones(64)), "runs": {}}
        state = init_state(trained, optimizer, False)
    update = jax.jit(optimizer.update)
    for step in range(int(state.step), steps):
        keys = jax.random.split(jax.random.key(step), 2)
        weight = Weight(jax.random.normal(keys[0], (65, 64)))
        grads = {"weight": weight, "bias": Vector(jnp.full(64, 0.1))}
        trained = {name: state.trained[name] for name in grads}
        updates, kept = update(grads, state.optimizer[0], trained)
        trained = optax.apply_updates(trained, updates) | {"runs": {}}
        state = state._replace(trained=trained, optimizer=(kept,), step=state.step + 1)
    return state


@pytest.mark.parametrize("moments", ENCODERS)
@pytest.mark.quick
def test_moments_go_on_to_the_bit_and_only_as_what_they_were(tmp_path, moments):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(train(moments, 2), {})
    restored, _ = checkpoints.restore(train(moments, 0))
    assert_same(restored, train(moments, 2))
    assert_same(train(moments, 4, restored), train(moments, 4))
    for other in ENCODERS.keys() - {moments}:
        with pytest.raises(UserError) as e:
            checkpoints.restore(train(other, 0))
        kind = r"(absent|\w+\[[\d, ]*\])"
        assert re.fullmatch(
            rf"{tmp_path / FOLDER}/2: does not hold this run's state: optimizer\.\S+ "
            rf"is {kind} there, but {kind} in this run; "
            r"give the optimizer\.moments of the run that wrote it",
            str(e.value),
        )


def test_a_half_written_checkpoint_is_ignored_and_swept_away(tmp_path, saved):
    whole = tmp_path / FOLDER / "3"
    half = tmp_path / FOLDER / "5.orbax-checkpoint-tmp"
    shutil.copytree(whole, half)
    again = Checkpoints(tmp_path, 2)
    assert again.latest() == 3
    assert_same(again.restore(make(0))[0], make(3))
    again.save(make(5), {})
    assert not half.exists()
    assert_same(again.restore(make(0))[0], make(5))


def test_reading_leaves_the_writers_folder_alone(tmp_path, saved):
    half = tmp_path / FOLDER / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / FOLDER / "3", half)
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path)
    assert_same(reader.restore(make(0))[0], make(3))
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_reading_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'none' / FOLDER}: no checkpoint in it"):
        Checkpoints(tmp_path / "none")
    assert not os.listdir(tmp_path)


KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.state import TrainState
a = lambda n: {"a": jnp.full((4, 4), 1.0 * n), "runs": {}}
make = lambda n: TrainState(a(n), ({},), jnp.int32(n), jnp.float32(1), jnp.int32(0))
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), 2)
checkpoints.save(make(1), {"n": 1})
for name in ("rename", "replace"):
    original = getattr(os, name)
    def kill(source, target, *rest, original=original, **more):
        if pathlib.Path(target).name == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(source, target, *rest, **more)
    setattr(os, name, kill)
checkpoints.save(make(2), {"n": 2})
"""


def test_a_process_killed_while_saving_leaves_the_last_good_one(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / FOLDER)) == 2
    like = TrainState(
        {"a": jnp.zeros((4, 4)), "runs": {}}, ({},), jnp.int32(0), jnp.float32(0), jnp.int32(0)
    )
    again = Checkpoints(tmp_path, 2)
    state, extra = again.restore(like)
    assert (int(state.step), extra) == (1, {"n": 1})
    np.testing.assert_array_equal(state.trained["a"], 1)
    again.save(state._replace(step=jnp.int32(2)), {})
    assert steps(tmp_path) == [1, 2]


@dropped_by_orbax
def test_a_file_size_limit_ends_in_one_clear_line(tmp_path, saved):
    large = make(4, d=jax.random.normal(jax.random.key(0), (200, 200)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(UserError) as e:
            saved.save(large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    assert str(e.value) == (
        f"{tmp_path / FOLDER}: a file grew past a size limit; raise it (ulimit -f), or write to "
        "another folder; the last good checkpoint is step 3"
    )
    # opened for reading, because a second writer would clean the folder while `saved` writes
    assert_same(Checkpoints(tmp_path).restore(make(0))[0], make(3))
    saved.save(large, {})
    assert_same(saved.restore(large)[0], large)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left [os_error_code='28']"),
    ],
    ids=["python", "tensorstore"],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_ends_in_one_clear_line(tmp_path, monkeypatch, error, before):
    checkpoints = Checkpoints(tmp_path, 2)
    if before:
        checkpoints.save(make(3), EXTRA)

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError) as e:
            checkpoints.save(make(4), {})
    kept = "the last good checkpoint is step 3" if before else "there is no checkpoint yet"
    assert str(e.value) == (
        f"{tmp_path / FOLDER}: no space left on this disk; free some, or write to another folder; "
        f"{kept}"
    )
    if before:
        assert_same(checkpoints.restore(make(0))[0], make(3))


def test_other_errors_are_not_hidden(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("bug")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(RuntimeError, match="bug"):
        saved.save(make(4), {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path / 'file' / FOLDER}: not a folder"):
        Checkpoints(tmp_path / "file", 2)


def test_a_checkpoint_of_a_newer_format_is_refused_and_kept(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(format_version, "NEWEST", 2)
    saved.save(make(5), EXTRA)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"checkpoints/5: of format 2, and this program reads up"):
        Checkpoints(tmp_path, 2).restore(make(0))
    assert steps(tmp_path) == [3, 5]
