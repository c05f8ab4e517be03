"""Selects the implementation of attention, and checks that it is correct on the device.

To add an implementation, write its module and add its name to `IMPLEMENTATIONS` and `FUSED`.
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
"""Name to module; a module has `forward` and `backward`. xla runs on every device."""


class FusedAttention(NamedTuple):
    """The requirements of an implementation that keeps scores in registers.

    Attributes:
      capability: least compute capability of an NVIDIA GPU.
      jax: least version of jax.
      dtypes: allowed dtypes of queries, keys and values.
      head_size: largest number of features of a head.
      queries: fewest queries per row; a block takes the same time with fewer queries.
    """

    capability: Capability
    jax: tuple[int, int]
    dtypes: tuple[str, ...]
    head_size: int
    queries: int

    def takes(self, capability: Capability | None, dtype: DTypeLike, head_size: int) -> bool:
        """Returns whether the implementation runs on the device.

        Args:
          capability: compute capability; None for a device that is no NVIDIA GPU.
          dtype: dtype of queries, keys and values.
          head_size: features of a head.
        """
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
"""Name to requirements, in order of preference."""


def module_of(implementation: str) -> ModuleType:
    """Imports and returns the module of an implementation."""
    return importlib.import_module(IMPLEMENTATIONS[implementation])


def pick(queries: int, head_size: int, dtype: DTypeLike) -> str:
    """Returns the implementation for the GPU that programs are compiled for.

    Args:
      queries: number of queries per row.
      head_size: features of a head.
      dtype: dtype of queries, keys and values.
    """
    able = usable(compiled_for(), dtype, head_size)
    return next((name for name in able if queries >= FUSED[name].queries), PLAIN)


def usable(capability: Capability | None, dtype: DTypeLike, head_size: int) -> list[str]:
    """Returns the names in `FUSED` that run on a GPU of this capability."""
    return [name for name, fused in FUSED.items() if fused.takes(capability, dtype, head_size)]


class Kind(NamedTuple):
    """The properties of one model's attention.

    Attributes:
      dtype: dtype of queries, keys and values.
      head_size: features of a head.
      group: heads of queries per head of keys.
      scale: factor on scores; None is head_size^-1/2.
      softcap: c in c·tanh(score/c), applied after scaling; None applies no cap.
    """

    dtype: str
    head_size: int
    group: int
    scale: float | None = None
    softcap: float | None = None


def trusted_attention(kind: Kind, device: jax.Device, warn: Callable[[str], None]) -> str | None:
    """Tests on the device the kernels that `pick` may return, and returns a run's implementation.

    Args:
      kind: attention of the run's model.
      device: device on which the kernels are tested.
      warn: function that receives a line for the user.

    Returns:
      None, which leaves the choice to `pick`; or xla, if a kernel gives wrong results.
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
"""Rows, length of a row (no multiple of a block) and heads of keys in the check."""


def agrees(implementation: str, kind: Kind) -> bool:
    """Returns whether attention and its gradients equal those of xla, up to rounding in the dtype.

    The error of each feature vector is compared with the norm of the vector. The more keys a query
    sees, the smaller is the norm of its result, and a large vector must not hide the error of a
    small one.
    """
    inputs = _inputs(kind)
    scale = kind.head_size**-0.5 if kind.scale is None else kind.scale

    def compiled(name: str) -> jax.stages.Compiled:
        module = module_of(name)

        def all_results(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            first: jax.Array,
            last: jax.Array,
            g: jax.Array,
        ) -> tuple[jax.Array, ...]:
            known = scale, kind.softcap, q, k, v, first, last
            results = module.forward(*known)
            return results[0], *module.backward(*known, *results, g)

        return jax.jit(all_results).lower(*inputs).compile()

    with ThreadPoolExecutor(2) as pool:
        ours, reference = pool.map(compiled, (implementation, PLAIN))
    # Both implementations round, by at most eps / 2 each time: the softmax weights or the gradients
    # of the scores; the results; and the attention that enters the mean gradient of the scores.
    tolerance = 4 * float(jnp.finfo(kind.dtype).eps)
    for result, expected in zip(ours(*inputs), reference(*inputs)):
        wide, exact = (np.asarray(x, np.float64) for x in (result, expected))
        error, size = (np.linalg.norm(x, axis=-1) for x in (wide - exact, exact))
        if not np.all(error <= tolerance * np.maximum(size, np.median(size))):
            return False
    return True


def _inputs(kind: Kind) -> tuple[jax.Array, ...]:
    """Returns q, k, v, first, last and g.

    The first row is one sequence. The second row has packed sequences and a sliding window.
    """
    random, (rows, length, heads) = np.random.default_rng(0), CHECKED

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(rows, length, heads, kind.head_size)), kind.dtype)

    last = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    first = np.zeros_like(last)
    starts = np.array([0, 1, length // 3])
    first[1] = np.maximum(starts[np.searchsorted(starts, last[1], "right") - 1], last[1] - 150)
    q, k, v, g = (normal(heads * each) for each in (kind.group, 1, 1, kind.group))
    return q, k, v, jnp.asarray(first), jnp.asarray(last), g
