"""A damaged checkpoint is reported in one line, and an older undamaged one is loaded."""

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_checkpoint import EXTRA, assert_same, make

from qlora_jax.runtime import digests
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.checkpoint import FOLDER, Checkpoints

# After an error orbax drops its other reads, which then warn at garbage collection.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning")
]


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Excludes the objects of other tests, about a million, from garbage collection."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, 2)
    for step in (3, 5):
        checkpoints.save(make(step), EXTRA)
    checkpoints.close()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files(run: Path, step: int) -> list[Path]:
    return sorted(path for path in (run / FOLDER / str(step)).rglob("*") if path.is_file())


def flip(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    if data:
        bit = random.Random(seed).randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data) or b"\0")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "another bit": lambda path: flip(path, 1),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "its folder gone": lambda path: shutil.rmtree(path.parent),
}


OFTEN = ("one bit", "gone")


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how in OFTEN else pytest.mark.slow) for how in DAMAGE],
)
def test_damage_to_any_file_gives_an_older_checkpoint_or_the_same_bytes(
    whole: Path, tmp_path: Path, how: str
) -> None:
    is_saved_again = False
    for number, name in enumerate(path.relative_to(whole) for path in files(whole, 5)):
        run = Path(shutil.copytree(whole, tmp_path / str(number)))
        DAMAGE[how](run / name)
        said: list[str] = []
        checkpoints = Checkpoints(run, 2)
        state, extra = checkpoints.restore(make(0), say=said.append)
        assert extra == EXTRA
        if not said:  # the file held no part of the state, or nothing is left of step 5
            assert_same(state, make(5 if (run / FOLDER / "5").exists() else 3))
        else:
            assert_same(state, make(3))
            (line,) = said
            assert f"{FOLDER}/5: damaged: " in line
            assert "step 3 is used instead, and the damaged one was renamed to damaged-5" in line
            assert "\n" not in line
            assert (run / FOLDER / "damaged-5").is_dir()
            assert not (run / FOLDER / "5").exists()
            if not is_saved_again:  # once is enough: what follows does not depend on the file
                checkpoints.save(make(5, seed=7), EXTRA)
                assert_same(checkpoints.restore(make(0))[0], make(5, seed=7))
                is_saved_again = True
        checkpoints.close()
    assert is_saved_again


def test_an_array_that_differs_is_named(run: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(run, 2)
    with monkeypatch.context() as patch:
        of_others = digests.digest
        patch.setattr(digests, "digest", lambda x: of_others(x + 1 if x.shape == (5,) else x))
        checkpoints.save(make(8), EXTRA)
    said: list[str] = []
    assert_same(checkpoints.restore(make(0), say=said.append)[0], make(5))
    assert "/8: damaged: trained.b differs from what was saved; step 5 is used instead" in said[0]


def test_with_no_whole_checkpoint_nothing_is_changed(run: Path) -> None:
    for step in (3, 5):
        for path in files(run, step):
            path.write_bytes(b"")
    before = sorted(run.rglob("*"))
    checkpoints = Checkpoints(run, 2)
    with pytest.raises(UserError, match=r"/5: damaged: .*/3: damaged: .*no older one: train"):
        checkpoints.restore(make(0))
    assert sorted(run.rglob("*")) == before


def test_the_one_of_the_lowest_loss_is_taken_or_none(run: Path) -> None:
    for path in files(run, 3):
        path.write_bytes(b"")
    said: list[str] = []
    with pytest.raises(UserError, match=r"/3: damaged: .*lowest held-out loss.*keep_best=false"):
        Checkpoints(run, 2).restore(make(0), 3, say=said.append)
    assert not said


def test_who_reads_takes_the_older_one_and_renames_nothing(run: Path) -> None:
    for path in files(run, 5):
        path.write_bytes(b"")
    before = sorted(run.rglob("*"))
    said: list[str] = []
    state, _ = Checkpoints(run).restore(make(0), say=said.append)
    assert_same(state, make(3))
    assert said[0].endswith("; step 3 is used instead")
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_without_digests_is_read(run: Path) -> None:
    for path in (run / FOLDER).glob("*/extra/metadata"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({key: stored[key] for key in EXTRA}))
    state, extra = Checkpoints(run, 2).restore(make(0))
    assert_same(state, make(5))
    assert extra == EXTRA
