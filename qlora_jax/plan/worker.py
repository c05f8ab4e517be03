"""Answers one request for a plan, as the process that `plan.planned` starts.

The process writes lines of JSON to standard output: progress first, and the answer last.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.choose import POLICIES
from qlora_jax.plan.compiled import GEMMS, Plan, gradient, make, mesh_of
from qlora_jax.plan.plan import DECODER
from qlora_jax.plan.search import largest
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    config = configs.from_tree(request["config"], "plan")
    decoder = DECODER.validate_python(request["decoder"])
    gpu = request["gpu"]

    train, data = config.train, config.data
    devices = f"{config.mesh.devices} x " if config.mesh.devices > 1 else ""
    _say(f"compiling for {devices}{gpu}: batch {train.batch_size}, {data.sequence_length} tokens")
    first = make(config, decoder, gpu)
    answer: dict[str, Any] = {"plan": dataclasses.asdict(first)}
    if request["search"] and first.fits:
        answer |= _largest(config, decoder, first, request["search"], request["positions"])
    return answer


def _largest(
    config: Config, decoder: DecoderConfig, first: Plan, search: Sequence[str], positions: int
) -> dict[str, int]:
    """Finds the largest batch at this length, or the longest sequence at this batch, or both.

    Settings that are `auto` take the value that needs the least device memory.

    Args:
      config: config of the run.
      decoder: shapes of the model.
      first: plan of the run.
      search: names in `plan.SEARCHES`.
      positions: longest sequence to try, in tokens.
    """
    hardware, away = read_gpu(first.gpu), config.optimizer.offload != "device"
    if config.model.remat == "auto":
        config = configs.changed(config, {"model.remat": POLICIES[-1]})
    worst = max(first.programs, key=lambda program: program.device).name
    gemm = next((name for name in GEMMS if worst.endswith(name)), next(iter(GEMMS)))
    batch, length = config.train.batch_size, config.data.sequence_length
    devices, mesh = config.mesh.devices, mesh_of(config, first.gpu)

    def needs(section: str, key: str) -> Callable[[int], int]:
        def of(value: int) -> int:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            changed = dataclasses.replace(config, **{section: part})
            _say(f"compiling for {first.gpu}: {key} {value}")
            step = compiled_memory.abstract_step(changed, decoder, hardware, mesh)
            made = gradient(step, first.gpu, gemm, mesh)
            return max(
                compiled_memory.with_moments(step, away, x.memory, False).device for x in made
            )

        return of

    rows, tokens = needs("train", "batch_size"), needs("data", "sequence_length")
    same = (config.model.remat, away) == (first.remat, first.offload == "host")
    now = first.device if same else tokens(length)
    longest = max(positions, length)
    ways: dict[str, tuple[Any, ...]] = {
        "batch": (rows, first.limit, (batch, now), devices, 1024 * devices),
        "sequence": (tokens, first.limit, (length, now), 128, longest),
    }
    return {f"largest_{what}": largest(*ways[what]) for what in search}


def _say(text: str) -> None:
    print(json.dumps({"say": text}), flush=True)


def main() -> None:
    """Reads a request from standard input, and writes messages; the last one is the answer."""
    jax.config.update("jax_platforms", "cpu")
    try:
        answer = _answer(json_files.parse(sys.stdin.read()))
    except UserError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
