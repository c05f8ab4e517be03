"""Defines the benchmarks and their options; our side and peers take the same options."""

from __future__ import annotations

import dataclasses
from typing import Any

from qlora_jax.runtime.errors import UserError

OPERATIONS = ("quantize", "dequantize", "forward", "backward")
DTYPES = ("bfloat16", "float32", "float16")
METHODS = ("qlora", "lora", "full")
REMAT = ("dots", "none", "full")
OFFLOAD = ("device", "host")
KERNELS = ("xla", "triton", "mosaic")


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Options of `bench kernels`: quantizing, decoding, and products with 4-bit weights.

    Attributes:
      shapes: shapes of the weights, each (in_features, out_features); empty: by device.
      rows: numbers of rows of the products' other operand; empty: by device.
      dtypes: dtypes of the products and of decoded weights; empty: by device.
      samples: timed calls of each case, after one warm-up call.
      operations: operations to time, from `OPERATIONS`.
      device: cpu or gpu; empty: the device that jax runs on.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    samples: int = 10
    operations: tuple[str, ...] = OPERATIONS
    device: str = ""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Options of `bench step`: forward, loss, backward, clipping and AdamW on random tokens.

    Attributes:
      model: folder, .gguf file, built-in name, or key of `models.shapes.SHAPES`; such a key means
        random weights made on the device.
      method: value of the setting `method`.
      dtype: compute dtype, and dtype of weights that are not quantized.
      remat: remat policy of the backward pass; peers have only none (used for dots too) and full.
      batch: rows of the batch.
      seq: tokens of a row, each with a target.
      rank: rank of the adapters.
      steps: timed steps, after one warm-up step.
      seed: seed of the tokens and of the adapters.
      prepare: for peers with qlora, whether to call peft.prepare_model_for_kbit_training, which
        holds the embeddings, norms and head in float32.
      offload: place of the moments, as in `optimizer.offload`; peers use a paged optimizer for
        host.
      kernel: our setting `kernels.implementation`; None: by device, dtype and rows.
      alpha: alpha of the adapters; None: twice the rank.
      target_modules: last parts of the names of linears with an adapter; empty: every linear.
      shape: config.json of `model`, for peers, if `model` is a published name; our run fills it
        in.
    """

    model: str
    method: str = "qlora"
    dtype: str = "bfloat16"
    remat: str = "dots"
    batch: int = 2
    seq: int = 256
    rank: int = 16
    steps: int = 6
    seed: int = 0
    prepare: bool = True
    offload: str = "device"
    kernel: str | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    shape: dict[str, Any] | None = None

    @property
    def lora_alpha(self) -> float:
        """Returns alpha, with its default filled in."""
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of `bench load`: reading a checkpoint into NF4 with double quantization."""

    model: str


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of `bench generate`: greedy generation in NF4 with double quantization.

    Attributes:
      model: folder, .gguf file, built-in name, or key of `models.shapes.SHAPES`; such a key means
        random weights made on the device.
      dtype: compute dtype, and dtype of weights that are not quantized.
      prompt: number of random tokens of the prompt.
      tokens: number of generated tokens of a row; the prefill gives the first.
      samples: timed answers, after one warm-up answer.
      seed: seed of the prompt.
      rows: answers that are generated at the same time.
      kernel: our setting `kernels.implementation`; None: by device, dtype and rows.
    """

    model: str
    dtype: str = "bfloat16"
    prompt: int = 34
    tokens: int = 64
    samples: int = 5
    seed: int = 0
    rows: int = 1
    kernel: str | None = None


Options = KernelOptions | StepOptions | LoadOptions | GenerateOptions

BENCHMARKS: dict[str, type[Options]] = {
    "kernels": KernelOptions,
    "step": StepOptions,
    "load": LoadOptions,
    "generate": GenerateOptions,
}


def to_tree(options: Options) -> dict[str, Any]:
    """Returns the options as a dict for JSON."""
    return dataclasses.asdict(options)


def from_tree(what: str, tree: dict[str, Any]) -> Any:
    """Returns the options of benchmark `what` from a dict of `to_tree`, with lists as tuples.

    JSON turns tuples into lists.

    Raises:
      UserError: there is no such benchmark.
    """
    if what not in BENCHMARKS:
        raise UserError(f"{what!r} is no benchmark; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[what](**{name: _frozen(value) for name, value in tree.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
