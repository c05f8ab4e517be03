"""The Python API `load`, `generate` and `train`, against the command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small_gguf import write_gguf

import qlora_jax as qj
from qlora_jax import config as configs
from qlora_jax import library
from qlora_jax.config import QuantConfig
from qlora_jax.formats.gguf import open_gguf
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model as read
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.interrupt import Stopped

PEFT = Path(__file__).parent / "golden" / "models" / "llama" / "peft_lora"
PROMPTS = ["What does rmtree do?", "And chr?"]

FIRST = """
import sys, types
library = types.ModuleType("qlora_jax.library")
library.train = lambda config, **options: (config, options)
library.generate = lambda: "generated"
sys.modules["qlora_jax.library"] = library
import qlora_jax as qj
assert "jax" not in sys.modules
"""
THEN = """
assert qj.train("a.yaml", resume=True) == ("a.yaml", {"resume": True})
from qlora_jax import train
from qlora_jax.train import rundir
assert train is qj.train is sys.modules["qlora_jax.train"]
assert qj.train({}) == ({}, {})
assert qj.train.rundir is rundir
assert qj.generate() == "generated"
assert {"load", "generate", "train"} <= set(dir(qj))
"""


@pytest.mark.parametrize(
    "before", ["", "import qlora_jax.train", "import qlora_jax.train.rundir", "qj.generate()"]
)
def test_train_is_called_whatever_was_imported_before(before):
    code = f"{FIRST}\n{before}\n{THEN}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def same(left, right):
    """Returns whether two models hold the same variables, equal to the bit."""
    leaves = [jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(m))) for m in (left, right)]
    return len(leaves[0]) == len(leaves[1]) and all(
        path == other and x.dtype == y.dtype and np.array_equal(x, y)
        for (path, x), (other, y) in zip(*leaves)
    )


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tiny_model, byte_vocabulary, tmp_path_factory):
    """The tiny model as a folder and as a GGUF file, each with the function that opens it."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, tiny_model, *byte_vocabulary)
    return {"folder": (tiny_model, open_folder), "gguf": (path, open_gguf)}


@pytest.mark.parametrize("kind", [pytest.param("folder", marks=SLOW), "gguf"])
@pytest.mark.parametrize(
    ("options", "quant", "dtype"),
    [
        ({}, QuantConfig(), "bfloat16"),
        pytest.param({"codebook": None, "dtype": np.float32}, None, "float32", marks=SLOW),
        pytest.param(
            {"codebook": "lloyd", "block_size": 32, "double_quant": False, "dtype": "float32"},
            QuantConfig(codebook="lloyd", block_size=32, double_quant=False),
            "float32",
            marks=SLOW,
        ),
    ],
)
def test_weights_are_the_files_as_asked(files, kind, options, quant, dtype):
    path, opened = files[kind]
    model, tokenizer = qj.load(path, **options)
    assert same(model, read(opened(path), quant=quant, dtype=dtype))
    assert tokenizer.decode(tokenizer.encode("chr")) == "chr"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_answers_are_the_command_lines(files, kind, run_cli):
    path, _ = files[kind]
    sampled = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampled.items()]
    asked = [f"--prompt={prompt}" for prompt in PROMPTS]
    ended = run_cli("generate", path, *asked, *options, "--system=Be brief.", "--json")
    assert ended.code == 0, ended.err
    model, tokenizer = qj.load(path)
    texts = qj.generate(model, tokenizer, PROMPTS, system="Be brief.", **sampled)
    assert texts == [row["answer"] for row in json.loads(ended.out)]
    alone = qj.generate(model, tokenizer, PROMPTS[0], system="Be brief.", **sampled)
    assert alone == texts[0]
    assert qj.generate(model, tokenizer, PROMPTS[0], **sampled) != alone


@SLOW
def test_without_the_template_a_prompt_is_continued(tiny_model):
    model, tokenizer = qj.load(tiny_model, codebook=None, dtype="float32")
    turns = tokenizer.render([{"role": "user", "content": PROMPTS[0]}], True)
    through = qj.generate(model, tokenizer, PROMPTS[0], max_new_tokens=8)
    assert qj.generate(model, tokenizer, turns, max_new_tokens=8, chat=False) == through
    assert qj.generate(model, tokenizer, PROMPTS[0], max_new_tokens=8, chat=False) != through


@pytest.mark.slow
def test_an_adapter_is_put_on(tiny_model, run_cli):
    model, tokenizer = qj.load(tiny_model, codebook=None, dtype="float32", adapter=PEFT)
    texts = qj.generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    held = ["--bits=16", "--dtype=float32", "--max-new-tokens=12", "--json"]
    asked = [f"--prompt={prompt}" for prompt in PROMPTS]
    ended = run_cli("generate", tiny_model, f"--adapter=x={PEFT}", *asked, *held)
    assert texts == [row["answer"] for row in json.loads(ended.out)]
    plain, _ = qj.load(tiny_model, codebook=None, dtype="float32")
    assert texts != qj.generate(plain, tokenizer, PROMPTS, max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 48}, "block_size 48 is not allowed"),
        ({"block_size": 0}, "qlora_jax.load: quant.block_size: "),
        ({"codebook": "nf5"}, "nf5.* nf4"),
        ({"dtype": "float8"}, "qlora_jax.load: model.compute_dtype: |model.storage_dtype: "),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"revision": "main"}, "is not a hub id and has no revisions"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tiny_model, options, says):
    with pytest.raises(UserError, match=says) as caught:
        qj.load(tiny_model, **options)
    assert "\n" not in str(caught.value)


def test_a_run_has_its_own_settings(tmp_path, write_config):
    write_config(tmp_path)
    for options in ({"codebook": None}, {"dtype": "float32"}, {"adapter": PEFT}):
        with pytest.raises(UserError, match="a run directory has its own settings"):
            qj.load(tmp_path, **options)


@pytest.fixture
def asked(monkeypatch):
    """Collects the configs and options that `train` passes on; nothing is trained."""
    calls = []

    def placed(config, **options):
        calls.append((config, options))
        raise UserError("not run")

    monkeypatch.setattr(library, "train_placed", placed)
    return calls


def test_settings_may_be_a_file_a_dict_or_a_config(asked, tmp_path, write_config):
    path = write_config(tmp_path)
    tree = json.loads(path.read_text("utf-8"))
    config = configs.load_config(path)
    shorter = tree | {"model": Path(tree["model"]["path"]), "output": Path(tree["output"])}
    for given in (path, str(path), tree, config, shorter):
        with pytest.raises(UserError, match="not run"):
            qj.train(given, resume=True)
    *first, last = [found for found, _ in asked]
    assert first == [config] * 4
    assert (last.model.path, last.output) == (config.model.path, config.output)
    commands = [options["command"] for _, options in asked]
    assert commands[0] == commands[1] == f"qlora-jax train {path}"
    run = tree["output"]
    assert commands[2] == f"qlora-jax train {run}/config.yaml --output={run}-again"
    assert [options["resume"] for _, options in asked] == [True] * 5


def test_settings_at_fault_are_named(asked, tmp_path, write_config):
    tree = json.loads(write_config(tmp_path).read_text("utf-8"))
    cases = {
        "config: unknown key lora.rnak; the nearest known one is lora.rank": {"lora": {"rnak": 1}},
        "config: train.steps 3 and train.epochs 1 are both": {"train": {"steps": 3, "epochs": 1}},
        r"config: lora.rank: .* not \[8\]": {"lora": {"rank": [8]}},
    }
    for says, change in cases.items():
        with pytest.raises(UserError, match=says):
            qj.train(tree | change)
    config = configs.from_tree(tree, "test")
    with pytest.raises(UserError, match=r"config: train.steps 4 and train.epochs 2 are both"):
        qj.train(dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2.0)))
    with pytest.raises(UserError, match="resume and overwrite exclude each other"):
        qj.train(tree, resume=True, overwrite=True)
    assert not asked


@pytest.fixture
def stopping(monkeypatch):
    """Returns a function that makes the next run stop by a signal."""

    def by(number):
        def placed(config, **options):
            raise Stopped(number, 7)

        monkeypatch.setattr(library, "train_placed", placed)

    return by


def test_an_interrupt_ends_in_keyboardinterrupt(stopping, tmp_path, write_config, capsys):
    stopping(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        qj.train(write_config(tmp_path))
    assert "stopped by SIGINT after step 7; the state is saved" in capsys.readouterr().err


def test_a_signal_goes_to_who_handles_it(stopping, tmp_path, write_config):
    stopping(signal.SIGTERM)
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(Stopped):
            qj.train(write_config(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [signal.SIGTERM]


@pytest.mark.slow
def test_a_run_is_the_command_lines(tmp_path, write_config, run_cli, capsys):
    path = write_config(tmp_path, data__system_prompt="Be brief.")
    ended = run_cli("train", path, f"--output={tmp_path / 'other'}", "--json")
    assert ended.code == 0, ended.err
    process = dict(os.environ), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    summary = qj.train(json.loads(path.read_text("utf-8")))
    assert process == (dict(os.environ), {n: signal.getsignal(n) for n in process[1]})
    other = json.loads(ended.out)
    assert summary.run_dir == str(tmp_path / "run")
    for name in ("steps", "eval_before", "eval_after", "base_hash", "trainable"):
        assert getattr(summary, name) == other[name], name
    assert summary.eval_after < summary.eval_before
    lines = capsys.readouterr().err
    assert f"run directory: {summary.run_dir}\n" in lines
    model, tokenizer = qj.load(summary.run_dir)
    own = "qlora_jax.generate(..., dtype='float32', system='Be brief.')"
    assert own in capsys.readouterr().err
    answer = run_cli("generate", summary.run_dir, f"--prompt={PROMPTS[0]}", "--json").out
    options = {"dtype": "float32", "system": "Be brief.", "max_new_tokens": 128}
    text = qj.generate(model, tokenizer, PROMPTS[0], **options)
    assert text == json.loads(answer)[0]["answer"]
    with pytest.raises(UserError, match="holds a run already"):
        qj.train(path)
