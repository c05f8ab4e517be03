"""Which implementation a product takes, and whether it is right on the device.

In this order: the implementations, as data; the rule by device, dtype and number of rows; the
choice for a run; the check on the device.

To add one that decodes inside the product: its module, and its name in `IMPLEMENTATIONS`, `FUSED`
and `FUSED_ROWS`. `make gpu-check` compiles it from then on and `docs/gpu.md` shows it.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.config import ModelSettings
from qlora_jax.kernels import triton_tiles
from qlora_jax.kernels.mosaic import tiles as mosaic_tiles
from qlora_jax.kernels.target import Capability, Hardware, capability_of, compiled_for
from qlora_jax.quant import QLayer, quantize
from qlora_jax.quant.scales import DOUBLE, PLAIN
from qlora_jax.runtime.errors import RunFailed, UserError

IMPLEMENTATIONS: Mapping[str, str] = {
    "xla": "qlora_jax.kernels.xla",
    "triton": "qlora_jax.kernels.triton",
    "mosaic": "qlora_jax.kernels.mosaic.kernel",
}
"""Name to module, each with `forward(x, q)` and `backward(g, q)`. xla runs on every device."""


class FusedProduct(NamedTuple):
    """Where an implementation that decodes inside the product runs, and what it looks like.

    Attributes:
      capability: the least compute capability of an NVIDIA GPU.
      jax: the least version of jax.
      dtypes: of x.
      scales: formats of block scales (`quant.scales.SCALES`) that it decodes; others are decoded to
        float32 before it.
      stacks: whether it takes a matrix out of its stack by itself (`quant.QLayer`).
      together: the rows of x for which its module multiplies several weights in one launch, by
        `several(x, qs)`.
      target: how the target of its custom call begins, in a compiled program.
      tile: (rows, dtype of x, contracted features, resulting features, direction, the GPU's
        compute capability) to the rows and columns of the result that one block computes.
    """

    capability: Capability
    jax: tuple[int, int]
    dtypes: tuple[str, ...]
    scales: tuple[str, ...]
    stacks: bool
    together: range
    target: str
    tile: Callable[[int, DTypeLike, int, int, str, Capability], tuple[int, int]]

    def __str__(self) -> str:
        major, minor = self.capability
        version = ".".join(map(str, self.jax))
        dtypes = " or ".join(self.dtypes)
        return f"NVIDIA GPUs from sm_{major}{minor}, jax from {version}, {dtypes}"


FUSED: Mapping[str, FusedProduct] = {
    "mosaic": FusedProduct(
        capability=(8, 0),
        jax=(0, 11),
        dtypes=("bfloat16", "float16"),
        scales=(PLAIN, DOUBLE),
        stacks=True,
        together=range(1, 17),  # more rows fill a GPU by themselves
        target="mosaic_gpu",
        tile=mosaic_tiles.block,
    ),
    "triton": FusedProduct(
        capability=(8, 0),
        jax=(0, 10),
        dtypes=("bfloat16", "float16", "float32"),
        scales=(PLAIN, DOUBLE),
        stacks=False,
        together=range(0),
        target="__gpu$xla.gpu.triton",
        tile=triton_tiles.block,
    ),
}
"""Name to facts, the preferred first."""

EVERY = sys.maxsize
"""More rows than there are."""

FUSED_ROWS: Mapping[str, Mapping[Capability, tuple[range, ...]]] = {
    "mosaic": {
        (8, 0): (range(17), range(1024, EVERY)),
        (8, 6): (range(EVERY),),
        (9, 0): (range(512),),
        (10, 0): (range(17),),
    },
    "triton": {},
}
"""Implementation to compute capability (and those above, up to the next) to the rows of x for which
it is no slower than decoding first: as measured where docs/results/gpu has a report of such a GPU
(`gpu/measured.py`), else as modelled (docs/gpu.md). This table is printed by `python -m
experiments.tools.gpu_table --rows`."""


def module_of(implementation: str) -> ModuleType:
    """Returns the module of an implementation; it is imported when first asked for.

    Raises:
      UserError: mosaic, on a jax that is too old for it.
    """
    return importlib.import_module(IMPLEMENTATIONS[implementation])


def pick(rows: int, dtype: DTypeLike) -> str:
    """Returns the implementation for `rows` of x on the GPU that is compiled for.

    It is the first that `FUSED_ROWS` has these rows for; elsewhere it is xla.
    """
    for name, some in picked(compiled_for(), dtype).items():
        if any(rows in each for each in some):
            return name
    return "xla"


def picked(capability: Capability | None, dtype: DTypeLike) -> dict[str, tuple[range, ...]]:
    """Returns what `pick` takes on such a GPU: name to the rows of x that it may take it for."""
    found = {}
    for name in usable(capability, dtype):
        known = [c for c in FUSED_ROWS[name] if capability is not None and c <= capability]
        if known and (some := FUSED_ROWS[name][max(known)]):
            found[name] = some
    return found


def usable(capability: Capability | None, dtype: DTypeLike) -> list[str]:
    """Returns the names in `FUSED` that run on a GPU of this capability in this dtype.

    None is a device that is no such GPU: nothing runs there.
    """
    return [
        name
        for name, fused in FUSED.items()
        if capability is not None
        and capability >= fused.capability
        and jax.__version_info__[:2] >= fused.jax
        and jnp.dtype(dtype).name in fused.dtypes
    ]


def choose_kernel(config: ModelSettings, device: Hardware) -> str | None:
    """Returns a run's implementation of products with 4-bit weights; None leaves it to `pick`.

    Raises:
      UserError: what the config asks for does not run on the device.
    """
    asked, never = config.kernels.implementation, config.kernels.materialize == "never"
    if config.method != "qlora" or (asked is None and not never):
        return None
    if asked == "xla":
        if never:
            raise UserError(
                "kernels.implementation xla decodes whole weights, which kernels.materialize never "
                "forbids; give another implementation, or set materialize to auto"
            )
        return asked
    dtype = config.model.compute_dtype
    able = usable(capability_of(device), dtype)
    if asked in able or (asked is None and able):
        return asked or able[0]
    setting = f"implementation {asked}" if asked else "materialize never"
    remedy = "remove it" if asked else "set it to auto"
    known = ", ".join(f"{name}: {fused}" for name, fused in FUSED.items())
    raise UserError(
        f"kernels.{setting}: no such kernel runs on {device.device_kind} in {dtype} ({known}); "
        f"{remedy}, or change the device or model.compute_dtype"
    )


def trusted_kernel(
    config: ModelSettings, device: jax.Device, warn: Callable[[str], None]
) -> str | None:
    """`choose_kernel`, after the kernels that the run may take were tried on the device.

    If one that `pick` may take is wrong, the run takes xla.

    Args:
      config: of the run, or of the model alone.
      device: to try them on.
      warn: called with a line for the user.

    Raises:
      UserError: as `choose_kernel`.
      RunFailed: the config asks for a kernel whose products are wrong here.
    """
    chosen, dtype = choose_kernel(config, device), config.model.compute_dtype
    if config.method != "qlora" or chosen == "xla":
        return chosen
    for name in [chosen] if chosen else picked(capability_of(device), dtype):
        if agrees(name, dtype):
            continue
        problem = f"kernel {name} gives wrong products on {device.device_kind} in {dtype}"
        if chosen:
            raise RunFailed(f"{problem}: set kernels.implementation to xla, and please report it")
        warn(f"warning: {problem}, so weights are decoded first; please report it")
        return "xla"
    return chosen


CHECKED_SHAPE = (512, 384)
CHECKED_ROWS = (3, 40, 200)
"""One for each kind of tile."""


def agrees(implementation: str, dtype: DTypeLike) -> bool:
    """Returns whether products in both directions are those of xla, to the rounding of `dtype`.

    Drivers, compilers and GPUs differ from those a kernel was tested on, and a wrong product would
    only show as a model that learns badly.
    """
    random = np.random.default_rng(0)
    stack = quantize(random.normal(size=(2, *CHECKED_SHAPE)).astype(np.float32))
    second = QLayer(stack, jnp.int32(1))  # as a model's layers give it
    # codebook, scale, their product, the sum and the result are rounded
    tolerance = 8 * float(jnp.finfo(dtype).eps)

    def both(name: str, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = module_of(name)
        q = second if name in FUSED and FUSED[name].stacks else second.cut()
        return module.forward(x, q), module.backward(g, q)

    inputs = [
        tuple(jnp.asarray(random.normal(size=(rows, size)), dtype) for size in CHECKED_SHAPE)
        for rows in CHECKED_ROWS
    ]
    programs = [
        jax.jit(functools.partial(both, name)).lower(x, g)
        for x, g in inputs
        for name in (implementation, "xla")
    ]
    with ThreadPoolExecutor(len(programs)) as pool:  # a GPU's compilers take seconds for each
        compiled = list(pool.map(jax.stages.Lowered.compile, programs))
    for (x, g), ours, reference in zip(inputs, compiled[::2], compiled[1::2]):
        for y, expected in zip(ours(x, g), reference(x, g)):
            wide, exact = (np.asarray(a, np.float64) for a in (y, expected))
            if not np.abs(wide - exact).max() <= tolerance * np.abs(exact).max():
                return False
    return True
