"""What a run needs on a GPU, by the compiler of that GPU, before it is rented.

The real step is compiled from shapes alone. Nothing runs: the figures are XLA's own buffer
assignment for the described device. Started as a process of its own (`planned`), because a process
compiles Mosaic kernels for one architecture only.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.gpu.compile import compile_for, environment, read_gpu
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import accounts
from qlora_jax.plan.accounts import Account, Step
from qlora_jax.plan.temporaries import Temporary, temporaries
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.errors import RunFailed, UserError

GEMMS: Mapping[str, Mapping[str, Any]] = {
    "Triton": {},
    "cuBLAS": {"xla_gpu_enable_triton_gemm": False},
}
"""Who multiplies plain matrices: on a GPU, autotuning chooses. The larger program counts."""

LARGEST = 12
"""Temporaries that are listed."""

COMMAND = [sys.executable, "-m", "qlora_jax.plan.plan"]

DECODER = TypeAdapter(DecoderConfig)
"""To JSON and back, for the process that compiles."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run needs on one GPU, in bytes.

    Attributes:
      gpu: name in `compile.GPUS`.
      offload: where moments live: device or host; decided here for `auto`.
      limit: what the run may use of the GPU (`gpu_memory.usable`).
      host: pinned host memory.
      programs: the step's: the gradient by each of `GEMMS`, then updates.
      temporaries: of the largest gradient program.
    """

    gpu: str
    offload: str
    limit: int
    host: int
    programs: list[Account]
    temporaries: list[Temporary]

    @property
    def device(self) -> int:
        return max(program.device for program in self.programs)

    @property
    def fits(self) -> bool:
        return self.device <= self.limit


def make(config: Config, decoder: DecoderConfig, gpu: str) -> Plan:
    """Compiles the step for a GPU in this process, which must have `compile.environment`.

    Raises:
      UserError: unknown GPU, missing packages, or settings that do not go together.
    """
    hardware = read_gpu(gpu)
    step = accounts.abstract_step(config, decoder, hardware)
    gradients = [gradient(step, gpu, gemm) for gemm in GEMMS]
    worst = max(gradients, key=lambda made: made[0].device)

    def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        return compile_for(gpu, function, *arguments, donate=donate)

    updates = accounts.update_accounts(step, compiled)
    limit = gpu_memory.usable(hardware.memory)
    offload, programs = accounts.settle(
        step, config.optimizer.offload, [account for account, _ in gradients], updates, limit
    )
    host = accounts.held_moments(step, offload == "host", False)[1] + worst[0].host
    return Plan(gpu, offload, limit, host, programs, worst[1])


def gradient(step: Step, gpu: str, gemm: str) -> tuple[Account, list[Temporary]]:
    """The gradient program with one of `GEMMS`; moments on the device are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, **GEMMS[gemm]}

        def compiled(function: Any, *arguments: Any) -> Any:
            return compile_for(gpu, function, *arguments, options=options)

        account = accounts.gradient_account(step, compiled)
        return account._replace(name=gemm), temporaries(Path(folder), LARGEST)


def largest(
    needs: Callable[[int], int], limit: int, first: tuple[int, int], unit: int, most: int
) -> int:
    """The largest value up to `most`, `first` and a multiple of `unit` above it, that fits.

    Guesses along the line through what is known, since memory is nearly straight in rows and in
    tokens, and goes on until the next value is known not to fit.

    Args:
      needs: bytes of a value.
      limit: bytes that there are.
      first: a value that fits, and its bytes.
      unit: granularity.
      most: the largest value that makes sense.
    """
    (fits, device), start = first, first[0]
    too_much = start + ((most - start) // unit + 1) * unit
    guess, attempts = start + unit, 0
    while fits + unit < too_much:
        guess = min(max(start + (guess - start) // unit * unit, fits + unit), too_much - unit)
        needed = needs(guess)
        slope = (needed - device) / (guess - fits)
        if needed <= limit:
            fits, device = guess, needed
        else:
            too_much = guess
        reach = fits + int((limit - device) / slope) if slope > 0 else too_much
        attempts += 1
        # where the line misleads, every other guess halves what is left
        by_line = fits <= reach < too_much and (attempts < 4 or attempts % 2)
        guess = reach if by_line else (fits + too_much) // 2
    return fits


def planned(
    config: Config, decoder: DecoderConfig, gpu: str, say: Callable[[str], None], search: bool
) -> dict[str, Any]:
    """`make` in a process of its own.

    Args:
      config: of the run.
      decoder: the model's shapes.
      gpu: name in `compile.GPUS`.
      say: told progress.
      search: also find the largest batch and sequence that fit.

    Returns:
      `plan`, and with `search` `largest_batch` and `largest_sequence`.

    Raises:
      UserError: as `make`.
      RunFailed: the compiler ended the process.
    """
    request = {
        "config": configs.to_tree(config),
        "decoder": DECODER.dump_python(decoder, mode="json"),
        "gpu": gpu,
        "search": search,
    }
    answer: dict[str, Any] = {}
    # a file, since a pipe that nobody reads yet would stop a compiler that has much to say
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment(),
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
    if "error" in answer:
        raise UserError(answer["error"])
    if "plan" not in answer:
        last = (errors.strip().splitlines() or ["nothing on standard error"])[-1]
        raise RunFailed(f"the compiler for {gpu} ended with {process.returncode}: {last}")
    raw = answer.pop("plan")
    raw["programs"] = [Account(*account) for account in raw["programs"]]
    raw["temporaries"] = [Temporary(*row) for row in raw["temporaries"]]
    return {"plan": Plan(**raw), **answer}


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
    """The largest batch at this length, and the largest sequence at this batch."""
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
    longest = max(decoder.max_positions, length)
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
        answer = _answer(json.load(sys.stdin))
    except UserError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
