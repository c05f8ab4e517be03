"""Fixtures: a server of the tiny model in a separate process, and adapters for the model."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_jax.text import tokenizer

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "golden" / "models"
MAIN = """
import sys
from qlora_jax import __main__
sys.exit(__main__.main())
"""


@dataclasses.dataclass
class Server:
    """A running `qlora-jax serve` process."""

    process: subprocess.Popen
    url: str
    log: Path

    def stop(self, number: int) -> tuple[int, str]:
        """Sends a signal and returns the exit code and the log."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=120)
        return code, self.log.read_text()


@pytest.fixture(scope="session")
def text(tiny_model: Path) -> tokenizer.Tokenizer:
    """Loads the tiny model's tokenizer."""
    return tokenizer.load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns folders of adapters for the tiny model, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    names = {"one": "peft_lora", "two": "peft_patterns", "three": "peft_rslora"}
    return {n: shutil.copytree(MODELS / "llama" / f, folder / n) for n, f in names.items()}


@pytest.fixture(scope="session")
def start(
    tiny_model: Path,
    adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """Returns a function that starts a server of the tiny model with adapters one and two.

    The server's process first runs the Python code `before`. The function waits until the log
    matches the pattern `until`.
    """
    processes = []

    def run(
        *options: str,
        model: Path = tiny_model,
        before: str = "",
        until: str = r"serving on (\S+)",
    ) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        given = [f"--adapter={name}={adapters[name]}" for name in ("one", "two")]
        command = ["serve", str(model), "--name=tiny", *given, "--port=0", "--dtype=float32"]
        command += ["--max-length=256", "--slots=3", "--max-adapters=3", *options]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", before + MAIN, *command],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stderr=stderr,
                stdout=subprocess.PIPE,
                text=True,
            )
        processes.append(process)
        deadline = time.monotonic() + 300
        while not (found := re.search(until, log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
        return Server(process, found[1], log)

    yield run
    for process in processes:
        process.kill()
        process.wait()
