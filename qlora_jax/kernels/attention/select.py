"""Chooses the implementation of attention, and checks it on the device.

To add one: its module, and its name in `IMPLEMENTATIONS` and `FUSED`.
"""

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.kernels.target import Capability, capability_of, compiled_for

PLAIN = "xla"
IMPLEMENTATIONS: Mapping[str, str] = {
    PLAIN: "qlora_jax.kernels.attention.reference",
    "triton": "qlora_jax.kernels.attention.triton",
}
"""Name to module, each with `forward` and `backward`. xla runs on every device."""


class FusedAttention(NamedTuple):
    """Where an implementation whose scores stay on the chip runs.

    Attributes:
      capability: the least compute capability of an NVIDIA GPU.
      jax: the least version of jax.
      dtypes: of queries, keys and values.
      head_size: the most features of a head.
      queries: the fewest in a row: a block of queries takes the same time however few they are.
    """

    capability: Capability
    jax: tuple[int, int]
    dtypes: tuple[str, ...]
    head_size: int
    queries: int

    def takes(self, capability: Capability | None, dtype: DTypeLike, head_size: int) -> bool:
        """Returns whether it runs on a GPU of this capability; None is a device that is none."""
        return (
            capability is not None
            and capability >= self.capability
            and jax.__version_info__[:2] >= self.jax
            and jnp.dtype(dtype).name in self.dtypes
            and head_size <= self.head_size
        )


FUSED: Mapping[str, FusedAttention] = {
    "triton": FusedAttention(
        capability=(8, 0),
        jax=(0, 10),
        dtypes=("bfloat16", "float16"),
        head_size=256,
        queries=64,
    ),
}
"""Name to facts, the preferred first."""


def module_of(implementation: str) -> ModuleType:
    """Returns the module of an implementation; it is imported when first asked for."""
    return importlib.import_module(IMPLEMENTATIONS[implementation])


def pick(queries: int, head_size: int, dtype: DTypeLike) -> str:
    """Returns the implementation for the GPU that is compiled for.

    Args:
      queries: of one row.
      head_size: features of a head.
      dtype: the queries', keys' and values'.
    """
    able = usable(compiled_for(), dtype, head_size)
    return next((name for name in able if queries >= FUSED[name].queries), PLAIN)


def usable(capability: Capability | None, dtype: DTypeLike, head_size: int) -> list[str]:
    """Returns the names in `FUSED` that run on a GPU of this capability."""
    return [name for name, fused in FUSED.items() if fused.takes(capability, dtype, head_size)]


class Kind(NamedTuple):
    """The attention of one model.

    Attributes:
      dtype: the queries', keys' and values'.
      head_size: features of a head.
      group: heads of queries for each head of keys.
      scale, softcap: as `attend` takes them.
    """

    dtype: str
    head_size: int
    group: int
    scale: float | None = None
    softcap: float | None = None


def trusted_attention(kind: Kind, device: jax.Device, warn: Callable[[str], None]) -> str | None:
    """Returns a run's implementation, after those that `pick` may take were tried on the device.

    Args:
      kind: the attention of the run's model.
      device: to try them on.
      warn: called with a line for the user.

    Returns:
      None, which leaves it to `pick`; or xla, if one is wrong.
    """
    for name in usable(capability_of(device), kind.dtype, kind.head_size):
        if not agrees(name, kind):
            warn(
                f"warning: attention kernel {name} is wrong on {device.device_kind} in "
                f"{kind.dtype} with heads of {kind.head_size}, so attention is computed by XLA, "
                "which is slower; please report it"
            )
            return PLAIN
    return None


CHECKED = 2, 600, 2
"""Rows, their length, which is no multiple of a block's, and heads of keys."""


def agrees(implementation: str, kind: Kind) -> bool:
    """Returns whether attention and its gradients are those of xla, to the rounding of the dtype.

    Every vector of features is compared by its length: a result's is shorter the more keys a query
    sees, and an error in a long one must not hide one in a short one.
    """
    inputs = _inputs(kind)
    scale = kind.head_size**-0.5 if kind.scale is None else kind.scale

    def compiled(name: str) -> jax.stages.Compiled:
        module = module_of(name)

        def all_results(q, k, v, first, last, g):
            known = scale, kind.softcap, q, k, v, first, last
            results = module.forward(*known)
            return results[0], *module.backward(*known, *results, g)

        return jax.jit(all_results).lower(*inputs).compile()

    with ThreadPoolExecutor(2) as pool:
        ours, reference = pool.map(compiled, (implementation, PLAIN))
    # by either: the weights of values or the slopes of scores, and the results; and in the slopes'
    # mean, the attention; each by half of eps at most
    tolerance = 4 * float(jnp.finfo(kind.dtype).eps)
    for result, expected in zip(ours(*inputs), reference(*inputs)):
        wide, exact = (np.asarray(x, np.float64) for x in (result, expected))
        error, size = (np.linalg.norm(x, axis=-1) for x in (wide - exact, exact))
        if not np.all(error <= tolerance * np.maximum(size, np.median(size))):
            return False
    return True


def _inputs(kind: Kind) -> tuple[jax.Array, ...]:
    """Returns q, k, v, first, last and g: a row of one sequence, and packed ones in a window."""
    random, (rows, length, heads) = np.random.default_rng(0), CHECKED

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(rows, length, heads, kind.head_size)), kind.dtype)

    last = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    first = np.zeros_like(last)
    starts = np.array([0, 1, length // 3])
    first[1] = np.maximum(starts[np.searchsorted(starts, last[1], "right") - 1], last[1] - 150)
    q, k, v, g = (normal(heads * each) for each in (kind.group, 1, 1, kind.group))
    return q, k, v, jnp.asarray(first), jnp.asarray(last), g
