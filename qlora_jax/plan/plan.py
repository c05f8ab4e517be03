"""Plans a run on a GPU by that GPU's compiler, before it is rented.

The compiler is started as a process of its own (`worker`), because a process compiles Mosaic
kernels for one architecture only.
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
"""To JSON and back, for the process that compiles."""


def planned(
    config: Config,
    decoder: DecoderConfig,
    gpu: str,
    say: Callable[[str], None],
    search: Sequence[str],
    positions: int | None = None,
) -> dict[str, Any]:
    """Plans a run in a process of its own; see `compiled.make`.

    Args:
      config: of the run.
      decoder: the model's shapes.
      gpu: name in `described.GPUS`.
      say: told progress.
      search: which of `SEARCHES` to find the largest of that fits: at these rows the longest
        sequence, or at this length the most rows.
      positions: the longest sequence that is looked for; None: as many as the model has.

    Returns:
      `plan`, and with `search` `largest_batch` or `largest_sequence`.

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
    raw["programs"] = [ProgramMemory(*account) for account in raw["programs"]]
    raw["temporaries"] = [Temporary(*row) for row in raw["temporaries"]]
    raw["traffic"] = raw["traffic"] and as_traffic(raw["traffic"])
    raw["times"] = raw["times"] and Times(*raw["times"])
    return {"plan": Plan(**raw), **answer}


def _environment(mesh: Mapping[str, int]) -> dict[str, str]:
    """Returns what a compiling process sets: on a mesh, what a run on one does."""
    made = environment()
    if mesh["data"] * mesh["fsdp"] > 1:
        compilation.overlap(made)
    return made


def _answer(request: Mapping[str, Any], say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Returns what a process answers to a request, and with what code and last words it ended."""
    answer: dict[str, Any] = {}
    # a file, since a pipe that nobody reads yet would stop a compiler that has much to say
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
