"""Fixtures for tests of whole runs: a model, tokenizer and data that train in a second."""

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qlora_jax import cli
from qlora_jax.runtime import compilation, cpu_devices

# Tests compare results to the bit with those of the program's process: compile in the same way.
compilation.use_wide_vectors()

# All workers, and the processes that tests start, share one compilation cache, because compiling is
# most of their time. It is set before jax is imported: pytest's first process makes the folder, and
# its workers inherit it.
if compilation.FOLDER not in os.environ:
    os.environ[compilation.FOLDER] = tempfile.mkdtemp()
    os.environ |= compilation.SETTINGS
    atexit.register(shutil.rmtree, os.environ[compilation.FOLDER], ignore_errors=True)

# The CPU counts as eight devices, for tests of runs on several devices. A program uses the first
# one by default. Processes that tests start inherit the setting.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
cpu_devices.give_threads()

# A shell starts a background process with SIGINT ignored, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first example compiles, and the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]
LLAMA = Path(__file__).parent / "golden" / "models" / "llama"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
WORDS = ("copytree", "rmtree", "sorted", "divmod", "chr", "open", "hash", "zip", "slice", "repr")


def pytest_collection_finish() -> None:
    """Makes garbage collection rare and without the imported modules; saves 6 % of a run's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Compiles a test marked `quick`, its fixtures included, with little optimization.

    The mark suits tests that compare within a tolerance, or compare a program with itself: they
    check the program that jax is given. It does not suit tests that compare two programs to the
    bit, or bound the memory of a compiled program: they depend on the compiler's code, too. Tests
    of bits that are equal for another reason (masks, interpret mode) may have the mark.
    """
    if item.get_closest_marker("quick") is None:
        return (yield)
    with quickly()(True):
        return (yield)


@functools.cache
def quickly() -> Callable[[bool], contextlib.AbstractContextManager[Any]]:
    """Returns a context manager within which XLA compiles with little optimization.

    Its state is a part of jax's cache keys; outside of it nothing changes. It patches a private
    function of jax, because jax has no such option for a part of a process. If jax has no such
    function, programs are compiled as usual.
    """
    import jax
    from jax._src import compiler

    usual = getattr(compiler, "get_compile_options", None)
    if usual is None:
        return lambda _: contextlib.nullcontext()
    context = jax.make_user_context(False)
    overrides = [("xla_backend_optimization_level", "0"), ("xla_cpu_use_fusion_emitters", "False")]
    known = [each for each in overrides if is_option(*each)]

    def options(*args: Any, **kwargs: Any) -> Any:
        found = usual(*args, **kwargs)
        if context.value:
            found.env_option_overrides = [*found.env_option_overrides, *known]
        return found

    compiler.get_compile_options = options
    return context


def is_option(name: str, value: str) -> bool:
    """Returns whether this jaxlib's compiler has the option; options differ between versions."""
    import jax

    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Ended(NamedTuple):
    """Result of a command: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Last line on stderr, which names the error."""
        return self.err.rstrip("\n").splitlines()[-1]


def byte_tokens() -> list[str]:
    """Returns GPT-2's letters for the bytes of UTF-8; special tokens still fit in 256 ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[b] for b in range(256) if b not in NEVER_IN_UTF8]


TOKENS = (*byte_tokens(), *SPECIAL)


def write_tokenizer(folder: Path, template: str | None) -> None:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_model(folder: Path, template: str | None = CHATML) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(LLAMA / name, folder / name)
    write_tokenizer(folder, template)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="session")
def byte_vocabulary() -> tuple[tuple[str, ...], str]:
    """The tiny model's tokens by id, and its chat template."""
    return TOKENS, CHATML


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Makes a Hugging Face folder: 3 layers, hidden size 64, 246 tokens of one byte each."""
    return write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model with a ChatML template; read only."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 24 short questions and answers; read only."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = [(WORDS[i % len(WORDS)], i) for i in range(24)]
    rows = [chat(f"What does {word} {i} do?", f"{word} is number {i}.") for word, i in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_config(tiny_model: Path, chats: Path) -> Callable[..., Path]:
    """Writes FOLDER/config.yaml for a run of a few short steps into FOLDER/run.

    Tests that do not change the shapes share the compiled programs: compiling is most of a run's
    time. Keyword arguments change a setting, with __ for the dot: `lora__rank=8`; None removes it.
    """

    def write(folder: Path, **changes: Any) -> Path:
        tree: dict[str, Any] = {
            "model": {"path": str(tiny_model), "compute_dtype": "float32"},
            "data": {"source": str(chats), "eval_source": str(chats), "sequence_length": 128},
            "output": str(folder / "run"),
            "lora": {"rank": 3, "alpha": 6},
            "optimizer": {"learning_rate": 0.01},
            "train": {
                "steps": 4,
                "batch_size": 8,
                "eval_every": 2,
                "eval_rows": 24,
                "save_every": 2,
                "samples": 0,
                "sample_tokens": 24,
            },
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
            if value is None:
                del node[last]
        path = folder / "config.yaml"
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
        return path

    return write


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Ended]:
    """Runs a command in this process."""

    def run(*arguments: str | os.PathLike[str]) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(a) for a in arguments])
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def run_process() -> Callable[..., Ended]:
    """Runs a command in a new process; keyword arguments are environment variables."""

    def run(*arguments: str | os.PathLike[str], **environment: str) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_jax", *map(str, arguments)],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run
