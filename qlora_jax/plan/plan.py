"""Plans a run on a GPU that this machine does not have, with the compiler for this GPU.

The compiler runs in a separate process (`worker`), because one process can compile Mosaic kernels
for only one architecture.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.gpu.compile import environment
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.compiled import Plan
from qlora_jax.plan.compiled_memory import ProgramMemory
from qlora_jax.plan.temporaries import Temporary
from qlora_jax.plan.traffic import Times, as_traffic
from qlora_jax.runtime import compilation
from qlora_jax.runtime.errors import RunFailed, UserError

COMMAND = [sys.executable, "-m", "qlora_jax.plan.worker"]

SEARCHES = ("batch", "sequence")

DECODER = TypeAdapter(DecoderConfig)
"""Converts a `DecoderConfig` to JSON and back, for the compiling process."""


def planned(
    config: Config,
    decoder: DecoderConfig,
    gpu: str,
    say: Callable[[str], None],
    search: Sequence[str],
    positions: int | None = None,
) -> dict[str, Any]:
    """Plans a run in a separate process, by `compiled.make`.

    Args:
      config: config of the run.
      decoder: shapes of the model.
      gpu: name in `described.GPUS`.
      say: function that is called with lines about the progress.
      search: names in `SEARCHES`. "batch" finds the most rows that fit at this sequence length,
        "sequence" the longest sequence that fits at this number of rows.
      positions: longest sequence, in tokens, that the search tries; None is the model's longest.

    Returns:
      Dict with `plan` and, for each search, `largest_batch` or `largest_sequence`.

    Raises:
      UserError: as `compiled.make`.
      RunFailed: the compiler ended the process.
    """
    request = {
        "config": configs.to_tree(config),
        "decoder": DECODER.dump_python(decoder, mode="json"),
        "gpu": gpu,
        "search": list(search),
        "positions": positions or decoder.longest,
    }
    answer, ended = _answer(request, say)
    if "error" in answer:
        raise UserError(answer["error"])
    if "plan" not in answer:
        raise RunFailed(f"the compiler for {gpu} ended with {ended}")
    raw = answer.pop("plan")
    raw["programs"] = [ProgramMemory(*memory) for memory in raw["programs"]]
    raw["temporaries"] = [Temporary(*row) for row in raw["temporaries"]]
    raw["traffic"] = raw["traffic"] and as_traffic(raw["traffic"])
    raw["times"] = raw["times"] and Times(*raw["times"])
    return {"plan": Plan(**raw), **answer}


def _environment(mesh: Mapping[str, int]) -> dict[str, str]:
    """Returns the environment of the compiling process; on a mesh with the XLA flags of a run."""
    made = environment()
    if mesh["data"] * mesh["fsdp"] > 1:
        compilation.overlap(made)
    return made


def _answer(request: Mapping[str, Any], say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Returns the answer of a process to a request, and its exit code with its last error line."""
    answer: dict[str, Any] = {}
    # A file, because a compiler with many messages would block on a pipe that nobody reads yet.
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=_environment(request["config"]["mesh"]),
        ) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None
            stdin.write(json.dumps(request))
            stdin.close()
            for line in stdout:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                else:
                    answer = message
        said.seek(0)
        errors = said.read()
    last = (errors.strip().splitlines() or ["nothing on standard error"])[-1]
    return answer, f"{process.returncode}: {last}"
