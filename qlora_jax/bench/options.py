"""What is measured, as data: every benchmark with its options, which all sides take alike."""

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
    """Quantizing, decoding and multiplying by 4-bit weights.

    Attributes:
      shapes: of weights, (in_features, out_features) each; empty: by device.
      rows: of the products' other operand; empty: by device.
      dtypes: of the products and of decoded weights; empty: by device.
      samples: timed calls of each case, after one to warm up.
      operations: of `OPERATIONS`.
      device: cpu or gpu; empty: what jax runs on.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    samples: int = 10
    operations: tuple[str, ...] = OPERATIONS
    device: str = ""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """One optimizer step: forward, loss, backward, clipping and AdamW, on random tokens.

    Attributes:
      model: a folder, a .gguf file, a built-in name, or a key of `models.shapes.SHAPES`, which
        stands for random weights made on the device.
      method: a setting `method`.
      dtype: of computation, and of weights that are not quantized.
      remat: what the backward pass computes again; peers know none (for dots, too) and full.
      batch: rows.
      seq: tokens a row, each with a target.
      rank: of the adapters.
      steps: timed steps, after one to warm up.
      seed: of the tokens and of the adapters.
      prepare: qlora, peers: peft.prepare_model_for_kbit_training, which holds the embeddings, norms
        and head in float32.
      offload: where moments live, as `optimizer.offload`; host is a paged optimizer for peers.
      kernel: of ours, as `kernels.implementation`; None: by device, dtype and rows.
      alpha: of the adapters; None: twice the rank.
      target_modules: last parts of the names of linears with an adapter; empty: every linear.
      shape: config.json of `model` where it is a published name, for peers; our run fills it in.
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
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Reading a checkpoint into NF4 with double quantization."""

    model: str


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Greedy text from a model in NF4 with double quantization.

    Attributes:
      model: a folder, a .gguf file, a built-in name, or a key of `models.shapes.SHAPES`, which
        stands for random weights made on the device.
      dtype: of computation, and of weights that are not quantized.
      prompt: random tokens that are read.
      tokens: tokens that are written, the first by reading the prompt.
      samples: timed answers, after one to warm up.
      seed: of the prompt.
      rows: answers that are written at one time.
      kernel: of ours, as `kernels.implementation`; None: by device, dtype and rows.
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
    """As JSON takes it."""
    return dataclasses.asdict(options)


def from_tree(what: str, tree: dict[str, Any]) -> Any:
    """The options of benchmark `what` that `to_tree` wrote, after JSON made its tuples lists.

    Raises:
      UserError: no such benchmark.
    """
    if what not in BENCHMARKS:
        raise UserError(f"{what!r} is no benchmark; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[what](**{name: _frozen(value) for name, value in tree.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
