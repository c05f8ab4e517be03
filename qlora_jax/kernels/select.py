"""The implementations that decode inside the product, as data: where they run, what they look like.

To add one: its module, its name in `matmul.IMPLEMENTATIONS`, one entry here. `make gpu-check`
compiles it from then on and `docs/gpu.md` shows it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.kernels import tuning
from qlora_jax.quant.qtensor import GROUP

Capability = tuple[int, int]


class Fused(NamedTuple):
    """One implementation.

    Attributes:
      capability: the least compute capability of an NVIDIA GPU.
      jax: the least version of jax.
      dtypes: of x.
      target: how the target of its custom call begins, in a compiled program.
      tile: (rows, dtype of x, contracted features, resulting features, direction, the GPU's
        compute capability) to the rows and columns of the result that one block computes.
    """

    capability: Capability
    jax: tuple[int, int]
    dtypes: tuple[str, ...]
    target: str
    tile: Callable[[int, DTypeLike, int, int, str, Capability], tuple[int, int]]

    def __str__(self) -> str:
        major, minor = self.capability
        version = ".".join(map(str, self.jax))
        dtypes = " or ".join(self.dtypes)
        return f"NVIDIA GPUs from sm_{major}{minor}, jax from {version}, {dtypes}"


def _triton_tile(
    m: int, dtype: DTypeLike, inner: int, outer: int, direction: str, capability: Capability
) -> tuple[int, int]:
    tile = tuning.triton_tile(m, dtype)
    return tile.m, tile.n if direction == "forward" else GROUP


def _mosaic_tile(
    m: int, dtype: DTypeLike, inner: int, outer: int, direction: str, capability: Capability
) -> tuple[int, int]:
    inner, outer = (-(-size // GROUP) * GROUP for size in (inner, outer))
    tile = tuning.mosaic_tile(m, inner, outer, capability)
    return tile.m, tile.o


FUSED: Mapping[str, Fused] = {
    "mosaic": Fused((8, 0), (0, 11), ("bfloat16", "float16"), "mosaic_gpu", _mosaic_tile),
    "triton": Fused(
        (8, 0), (0, 10), ("bfloat16", "float16", "float32"), "__gpu$xla.gpu.triton", _triton_tile
    ),
}
"""Name to facts, the preferred first."""


def usable(capability: Capability | None, dtype: DTypeLike) -> list[str]:
    """Names in `FUSED` that run on a GPU of this capability (None: no such GPU) in this dtype."""
    return [
        name
        for name, fused in FUSED.items()
        if capability is not None
        and capability >= fused.capability
        and jax.__version_info__[:2] >= fused.jax
        and jnp.dtype(dtype).name in fused.dtypes
    ]


def capability_of(device: object) -> Capability | None:
    """An NVIDIA GPU's compute capability, (8, 0) for sm_80; None of any other device."""
    text = getattr(device, "compute_capability", None)
    try:
        major, minor = map(int, str(text).split("."))
    except ValueError:
        return None
    return major, minor


def half_dtype(capability: Capability | None) -> str:
    """Returns the 16-bit dtype that a device multiplies fast: before sm_80, GPUs lack bfloat16."""
    return "float16" if capability is not None and capability < (8, 0) else "bfloat16"


_target: ContextVar[Capability | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(capability: Capability) -> Iterator[None]:
    """Within it products are for a GPU of this capability, which need not be here."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def for_a_cpu() -> bool:
    """Returns whether programs are compiled for a CPU."""
    return _target.get() is None and jax.default_backend() == "cpu"


def pick(rows: int, dtype: DTypeLike) -> str:
    """The implementation for `rows` of x on the GPU that is compiled for: by `tuning.FUSED_ROWS`.

    Elsewhere, and for other rows, it is xla.
    """
    for name, some in picked(_target.get() or capability_of(jax.devices()[0]), dtype).items():
        if any(rows in each for each in some):
            return name
    return "xla"


def picked(capability: Capability | None, dtype: DTypeLike) -> dict[str, tuple[range, ...]]:
    """Name to the rows of x that `pick` may take it for, of what it takes on such a GPU at all."""
    found = {}
    for name in usable(capability, dtype):
        known = [c for c in tuning.FUSED_ROWS[name] if capability is not None and c <= capability]
        if known and (some := tuning.FUSED_ROWS[name][max(known)]):
            found[name] = some
    return found
