"""Answers one request for a plan, in the process that `plan.planned` starts for it.

Messages are lines of JSON on standard output: progress, then the answer.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import accounts
from qlora_jax.plan.compiled import GEMMS, Plan, gradient, make
from qlora_jax.plan.plan import DECODER
from qlora_jax.plan.search import largest
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    config = configs.from_tree(request["config"], "plan")
    decoder = DECODER.validate_python(request["decoder"])
    gpu = request["gpu"]

    train, data = config.train, config.data
    _say(f"compiling for {gpu}: batch {train.batch_size}, {data.sequence_length} tokens")
    first = make(config, decoder, gpu)
    answer: dict[str, Any] = {"plan": dataclasses.asdict(first)}
    if request["search"] and first.fits:
        answer |= _largest(config, decoder, first)
    return answer


def _largest(config: Config, decoder: DecoderConfig, first: Plan) -> dict[str, int]:
    """Finds the largest batch at this length, and the largest sequence at this batch."""
    hardware, away = read_gpu(first.gpu), first.offload == "host"
    worst = max(first.programs[: len(GEMMS)], key=lambda program: program.device)
    batch, length = config.train.batch_size, config.data.sequence_length

    def needs(section: str, key: str) -> Callable[[int], int]:
        def of(value: int) -> int:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            changed = dataclasses.replace(config, **{section: part})
            _say(f"compiling for {first.gpu}: {key} {value}")
            step = accounts.abstract_step(changed, decoder, hardware)
            account, _ = gradient(step, first.gpu, worst.name)
            return accounts.with_moments(step, away, account, False).device

        return of

    now = worst.device
    longest = max(decoder.longest, length)
    return {
        "largest_batch": largest(needs("train", "batch_size"), first.limit, (batch, now), 1, 1024),
        "largest_sequence": largest(
            needs("data", "sequence_length"), first.limit, (length, now), 128, longest
        ),
    }


def _say(text: str) -> None:
    print(json.dumps({"say": text}), flush=True)


def main() -> None:
    """Reads a request from standard input and writes messages, the last of them the answer."""
    jax.config.update("jax_platforms", "cpu")
    try:
        answer = _answer(json_files.parse(sys.stdin.read()))
    except UserError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
