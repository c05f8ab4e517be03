"""Each kind of bad input: exit code 2, one clear line, and nothing left behind."""

import errno
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.quick

WriteConfig = Callable[..., Path]
RunCli = Callable[..., Any]
Damage = Callable[[Path], None]


def check(ended: Any, *expected: str) -> None:
    """Checks exit code 2, and that the last line is the only error and holds all of `expected`."""
    assert ended.code == 2, ended.err
    lines = ended.err.rstrip("\n").splitlines()
    assert [line for line in lines if line.startswith("qlora-jax: ")] == lines[-1:]
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for text in expected:
        assert text in ended.message


@pytest.fixture
def fails(tmp_path: Path, write_config: WriteConfig, run_cli: RunCli) -> Callable[..., None]:
    """Trains with a changed config; checks the error line, and that no run directory appears."""

    def run(*expected: str, arguments: tuple[str, ...] = (), **changes: Any) -> None:
        ended = run_cli("train", write_config(tmp_path, **changes), *arguments)
        check(ended, *expected)
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora__rnak": 8}, ["unknown key lora.rnak", "lora.rank"]),
        ({"learning_rate": 1}, ["unknown key learning_rate", "optimizer.learning_rate"]),
        ({"train__steps": "many"}, ["train.steps", "'many'", "expected: int"]),
        ({"data__packing": "perhaps"}, ["data.packing", "'perhaps'", "expected: bool"]),
        ({"method": "dora"}, ["method", "'dora'", "qlora | lora | full"]),
        ({"data": None}, ["data is missing", "--data="]),
        ({"lora__rank": 0}, ["lora.rank", "greater than or equal to 1", "0"]),
        ({"lora__rank_pattern": {"q_proj": 0}}, ["lora.rank_pattern", "greater than"]),
        ({"lora__target_modules": ["q_porj"]}, ["lora.target_modules", "q_porj", "q_proj"]),
        ({"lora__target_modules": r".*\.nothing"}, ["lora.target_modules", "q_proj"]),
        ({"lora__target_modules": "(q"}, ["lora.target_modules '(q'", "regular expression"]),
        ({"lora__rank_pattern": {"nothing": 2}}, ["lora.rank_pattern", "nothing", "q_proj"]),
        ({"quant__block_size": 48}, ["block_size", "48", "64"]),
        ({"quant__block_size": 16}, ["block_size", "16", "64"]),
        ({"quant__codebook": "nf5"}, ["codebook", "nf5", "nf4"]),
        ({"kernels__materialize": "never"}, ["kernels.materialize never", "cpu", "set it to auto"]),
        ({"kernels__implementation": "cuda"}, ["kernels.implementation", "xla | triton | mosaic"]),
        ({"data__sequence_length": 1024}, ["data.sequence_length 1024", "give 512 or less"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_used(
    fails: Callable[..., None], changes: dict[str, Any], expected: list[str]
) -> None:
    fails(*expected, **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "config.yaml:1: not valid YAML"),
        ("a\n", "a config is a mapping; give it keys of these: model, data, output"),
        ("", "a config is a mapping"),
    ],
)
def test_a_config_that_is_not_one(
    tmp_path: Path, run_cli: RunCli, text: str, expected: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    check(run_cli("train", tmp_path / "config.yaml"), expected)


def test_a_missing_config(tmp_path: Path, run_cli: RunCli) -> None:
    for command in ("train", "evaluate"):
        check(run_cli(command, tmp_path / "no.yaml"), f"{tmp_path}/no.yaml: no such config file")


def test_a_directory_without_a_run(tmp_path: Path, run_cli: RunCli) -> None:
    for arguments in (["evaluate", tmp_path], ["generate", tmp_path, "--prompt", "a"]):
        check(run_cli(*arguments), f"{tmp_path}: not a run directory")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("no.jsonl", None, "no.jsonl: no such file"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl:2: not valid JSON"),
        ("list.jsonl", '{"text": "a"}\n\n[1]\n', "list.jsonl:3: must be a JSON object"),
        ("empty.jsonl", "", "empty.jsonl: no examples in it"),
        ("blank.jsonl", "\n\n", "blank.jsonl: no examples in it"),
        ("empty.txt", "", "empty.txt: no examples in it"),
        ("fields.jsonl", '{"foo": 1, "bar": 2}\n', "the fields are foo, bar"),
        ("one.jsonl", '{"text": "a"}\n{"tixt": "b"}\n', "one.jsonl:2: the fields are tixt"),
        ("type.jsonl", '{"text": 3}\n', "type.jsonl:1: text must be a string"),
        ("list.json", '{"text": "a"}', "list.json: must be a list of objects"),
        ("cut.csv", 'text\nb\n"a\nc', "cut.csv:3: not valid CSV"),
        ("head.csv", '"text\n', "head.csv:1: not valid CSV"),
        ("latin.txt", b"caf\xe9", "latin.txt:1: not UTF-8"),
        ("bad.parquet", "PAR1", "bad.parquet: not a readable Parquet file"),
        ("data.xyz", "a", "data.xyz: a data file ends in .jsonl"),
        (
            "role.jsonl",
            '{"messages": [{"role": "robot", "content": "a"}]}\n',
            "role.jsonl:1: messages[0]: unknown role 'robot'; name it user",
        ),
        (
            "asks.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "none of the 1 examples has an answer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:13] else "",
)
def test_data_that_cannot_be_read(
    tmp_path: Path,
    fails: Callable[..., None],
    name: str,
    content: str | bytes | None,
    expected: str,
) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    source = str(tmp_path / name)
    fails(expected, data__source=source, data__eval_source=None, data__on_bad_record="error")


def test_missing_held_out_data(tmp_path: Path, fails: Callable[..., None]) -> None:
    fails("gone.jsonl: no such file", data__eval_source=str(tmp_path / "gone.jsonl"))


def test_chat_data_without_a_chat_template(
    tmp_path: Path, fails: Callable[..., None], make_model: Callable[..., Path]
) -> None:
    folder = make_model(tmp_path / "plain", template=None)
    fails("chats.jsonl:1", f"{folder}: the tokenizer has no chat template", model__path=str(folder))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def garble_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def be_another_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def break_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ["model.safetensors: truncated or damaged", "download it again"]),
        (garble, ["model.safetensors: truncated or damaged", "download it again"]),
        (empty, ["model.safetensors: truncated or damaged", "download it again"]),
        (lose_a_tensor, ["model.layers.1.mlp.up_proj.weight"]),
        (lose_the_weights, ["no model.safetensors in it"]),
        (lose_the_config, ["no config.json in it"]),
        (break_the_config, ["config.json: not valid JSON"]),
        (lose_the_tokenizer, ["no tokenizer.json in it"]),
        (garble_the_tokenizer, ["the tokenizer cannot be loaded"]),
        (be_another_type, ["config.json", "'mamba' is not supported", "llama, mistral, qwen2"]),
    ],
)
def test_a_damaged_model(
    tmp_path: Path,
    fails: Callable[..., None],
    make_model: Callable[..., Path],
    damage: Damage,
    expected: list[str],
) -> None:
    folder = make_model(tmp_path / "model")
    damage(folder)
    fails(str(folder), *expected, model__path=str(folder))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.gguf", b"GGUF\x03\x00\x00\x00\x01", "m.gguf: truncated"),
        ("m.gguf", b"not a model", "m.gguf: not a GGUF file"),
        ("m.gguf", b"", "m.gguf: not a GGUF file; give a file made by llama.cpp's converter"),
        ("m.gguf", None, "m.gguf: no such file or folder"),
        ("m.safetensors", b"a", "m.safetensors: a model is a Hugging Face folder or a .gguf file"),
    ],
    ids=["truncated", "garbled", "empty", "missing", "safetensors"],
)
def test_a_damaged_model_file(
    tmp_path: Path,
    fails: Callable[..., None],
    name: str,
    content: bytes | None,
    expected: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fails(expected, model__path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        ("qlora", "model.layers.2.mlp.down_proj.weight"),
        ("lora", "model.layers.0.self_attn.q_proj.weight"),
        ("full", "model.norm.weight"),
        ("qlora", "model.embed_tokens.weight"),
    ],
)
def test_a_weight_with_nan(
    tmp_path: Path,
    fails: Callable[..., None],
    make_model: Callable[..., Path],
    method: str,
    tensor: str,
) -> None:
    folder = make_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[tensor].flat[7] = math.nan
    save_file(weights, folder / "model.safetensors")
    fails(f"{tensor}: holds NaN or Inf", model__path=str(folder), method=method)


def test_a_rank_above_the_matrix_is_allowed_and_warned_about(
    tmp_path: Path, write_config: WriteConfig, run_cli: RunCli
) -> None:
    config = write_config(tmp_path, lora__rank_pattern={"layers.1.*.k_proj": 40})
    ended = run_cli("evaluate", config)
    assert ended.code == 0, ended.err
    assert re.search(
        r"^warning: .*above min\(in, out\).*model\.layers\.1\.self_attn\.k_proj", ended.err, re.M
    )


@pytest.fixture
def finished(tmp_path: Path, write_config: WriteConfig, run_cli: RunCli) -> Path:
    """The config of a finished run of one step."""
    config = write_config(tmp_path, train__steps=1, data__eval_source=None)
    assert run_cli("train", config).code == 0
    return config


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_directory_that_holds_a_run(finished: Path, run_cli: RunCli) -> None:
    folder = finished.parent / "run"
    before = files(folder)
    check(run_cli("train", finished), "holds a run already", "--resume", "--overwrite", "--output")
    check(
        run_cli("train", finished, "--resume", "--lora.rank=9", "--optimizer.beta1=0.8"),
        f"{folder}: was made with another config",
        "lora.rank: 3 → 9; optimizer.beta1: 0.9 → 0.8; leave these",
    )
    check(run_cli("train", finished, "--resume", "--overwrite"), "exclude each other")
    check(
        run_cli("train", finished, "--overwrite", "--lora.target_modules=x"), "lora.target_modules"
    )
    check(run_cli("evaluate", folder, "--lora.rank=9"), "a run directory's settings are fixed")
    assert files(folder) == before


def test_a_directory_that_holds_something_else(
    tmp_path: Path, write_config: WriteConfig, run_cli: RunCli
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for flags in ((), ("--resume",), ("--overwrite",)):
        check(run_cli("train", write_config(tmp_path), *flags), "is not a run directory")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_a_stranger_in_a_finished_run(finished: Path, run_cli: RunCli) -> None:
    folder = finished.parent / "run"
    (folder / "thesis.tex").write_text("years of work")
    before = files(folder)
    check(run_cli("train", finished, "--overwrite"), f"{folder}: holds thesis.tex", "move it away")
    assert files(folder) == before
    (folder / "thesis.tex").unlink()
    ended = run_cli("train", finished, "--overwrite")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("output", ["file", "file/run", "file/a/b", "/proc/run"])
def test_an_output_that_cannot_be_written(
    tmp_path: Path, write_config: WriteConfig, run_cli: RunCli, output: str
) -> None:
    (tmp_path / "file").write_text("a")
    output = str(tmp_path / output)
    check(
        run_cli("train", write_config(tmp_path, output=output)), output, "; give another --output"
    )
    assert (tmp_path / "file").read_text() == "a"


def test_an_output_in_a_read_only_folder(
    tmp_path: Path, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may write anywhere, so the test replaces the answer of the system
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    fails(f"{tmp_path} is not writable by this user")


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without search permission; simulated, because root may search any folder."""
    folder = tmp_path / "locked"

    def deny(name: str) -> None:
        usual = getattr(Path, name)

        def ask(path: Path, *args: Any, **kwargs: Any) -> Any:
            if folder in path.parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return usual(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, ask)

    for name in ("stat", "exists", "is_file", "is_dir", "open", "read_text", "read_bytes"):
        deny(name)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "run"},
        {"model__path": "model"},
        {"model__path": "m.gguf"},
        {"data__source": "a.jsonl"},
        {"data__source": "a.txt"},
        {"data__eval_source": "folder"},
    ],
    ids=str,
)
def test_a_path_below_a_folder_that_may_not_be_searched(
    locked: Path, fails: Callable[..., None], changes: dict[str, str]
) -> None:
    changes = {key: str(locked / name) for key, name in changes.items()}
    fails(f"{next(iter(changes.values()))}", "not readable by this user; change its", **changes)


def test_a_run_below_a_folder_that_may_not_be_searched(locked: Path, run_cli: RunCli) -> None:
    for arguments in (
        ["train", locked / "c.yaml"],
        ["train", locked / "run", "--resume"],
        ["evaluate", locked / "run"],
        ["generate", locked / "run", "--prompt", "a"],
    ):
        check(run_cli(*arguments), f"{arguments[1]}", "not readable by this user; change its")


@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving(
    tmp_path: Path, write_config: WriteConfig, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, train__steps=6)
    save = ocp.CheckpointManager.save

    def full(manager: Any, step: int, *args: Any, **kwargs: Any) -> bool:
        if step < 4:
            return save(manager, step, *args, **kwargs)
        half = Path(manager.directory) / f"{step}.orbax-checkpoint-tmp"
        half.mkdir()
        (half / "part").write_bytes(b"\0")
        raise OSError(errno.ENOSPC, "No space left on device", str(half))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        ended = run_cli("train", config)
    check(ended, "checkpoints: no space left", "the last good checkpoint is step 2")
    assert run_cli("evaluate", tmp_path / "run").out.startswith("step 2, ")
    manifest, metrics = (tmp_path / "run" / name for name in ("manifest.json", "metrics.jsonl"))
    described, figures = manifest.read_bytes(), metrics.read_bytes()
    metrics.write_bytes(b"[]\n" + figures)
    check(run_cli("train", config, "--resume"), "metrics.jsonl:1: ", "remove this line")
    assert manifest.read_bytes() == described
    metrics.write_bytes(figures)
    ended = run_cli("train", config, "--resume", "--json")
    assert ended.code == 0, ended.err
    assert "resumed from step 2" in ended.err
    assert np.isfinite(json.loads(ended.out)["eval_after"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_not_the_inputs_fault(
    tmp_path: Path, write_config: WriteConfig, run_cli: RunCli
) -> None:
    config = write_config(tmp_path, optimizer__learning_rate=1e30, train__save_every=1)
    ended = run_cli("train", config)
    assert ended.code == 1
    assert re.match(r"qlora-jax: step \d: .*last good checkpoint is step \d", ended.message)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"model__path": "nobody/nothing"},
            ["nobody/nothing: not in the local hub cache", "cannot be reached", "smollm2"],
            id="model",
        ),
        pytest.param(
            {"data__source": "nobody/nothing", "data__eval_source": None},
            ["nobody/nothing: the hub cannot be reached", "python-docs"],
            id="data",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_hub_id_without_network(
    tmp_path: Path,
    write_config: WriteConfig,
    run_process: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    ended = run_process(
        "train",
        write_config(tmp_path, **changes),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert time.monotonic() - start < 20  # imports included, on a busy machine
    check(ended, *expected)
    assert not (tmp_path / "run").exists()
