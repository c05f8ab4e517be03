"""Selects the implementation of a product, and checks that it is correct on the device.

The module has four parts: the implementations, as data; the rule by device, dtype and number of
rows; the choice for a run; the check on the device.

To add an implementation that decodes inside the product, write its module and add its name to
`IMPLEMENTATIONS`, `FUSED` and `FUSED_ROWS`. `make gpu-check` then compiles it, and `docs/gpu.md`
lists it.
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
"""Name to module; a module has `forward(x, q)` and `backward(g, q)`. xla runs on every device."""


class FusedProduct(NamedTuple):
    """Requirements and properties of an implementation that decodes inside the product.

    Attributes:
      capability: least compute capability of an NVIDIA GPU.
      jax: least version of jax.
      dtypes: allowed dtypes of x.
      scales: formats of block scales (`quant.scales.SCALES`) that the kernel decodes; other formats
        are decoded to float32 before the kernel runs.
      stacks: True if the kernel accepts a layer of a stack (`quant.QLayer`) without a copy.
      together: numbers of rows of x for which the module multiplies several weights in one launch,
        with `several(x, qs)`.
      target: prefix of the custom call's target in a compiled program.
      tile: function of (rows, dtype of x, contracted features, resulting features, direction,
        compute capability of the GPU) that returns the rows and columns of the result that one
        thread block computes.
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
        """Returns the requirements as text, for messages."""
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
        together=range(1, 17),  # a product with more rows fills a GPU alone
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
"""Name to properties, in order of preference."""

EVERY = sys.maxsize
"""End of a range of rows that has no upper limit."""

FUSED_ROWS: Mapping[str, Mapping[Capability, tuple[range, ...]]] = {
    "mosaic": {
        (8, 0): (range(17), range(1024, EVERY)),
        (8, 6): (range(EVERY),),
        (9, 0): (range(512),),
        (10, 0): (range(17),),
    },
    "triton": {},
}
"""Implementation, then compute capability, to the rows of x for which it is no slower than decoding
first. An entry holds for its capability and those above, up to the next entry. The values are
measured if docs/results/gpu has a report of such a GPU (`gpu/measured.py`), and modelled otherwise
(docs/gpu.md). `python -m experiments.tools.gpu_table --rows` prints this table."""


def module_of(implementation: str) -> ModuleType:
    """Imports and returns the module of an implementation.

    Raises:
      UserError: the implementation is mosaic and the installed jax is too old for it.
    """
    return importlib.import_module(IMPLEMENTATIONS[implementation])


def pick(rows: int, dtype: DTypeLike) -> str:
    """Returns the implementation for `rows` rows of x on the GPU that is compiled for.

    This is the first implementation whose entry in `FUSED_ROWS` contains the number of rows; if
    there is none, xla.
    """
    for name, some in picked(compiled_for(), dtype).items():
        if any(rows in each for each in some):
            return name
    return "xla"


def picked(capability: Capability | None, dtype: DTypeLike) -> dict[str, tuple[range, ...]]:
    """Returns the implementations that `pick` may return on such a GPU, with their rows of x."""
    found = {}
    for name in usable(capability, dtype):
        known = [c for c in FUSED_ROWS[name] if capability is not None and c <= capability]
        if known and (some := FUSED_ROWS[name][max(known)]):
            found[name] = some
    return found


def usable(capability: Capability | None, dtype: DTypeLike) -> list[str]:
    """Returns the names in `FUSED` that run on a GPU of this capability in this dtype.

    Args:
      capability: compute capability; None for a device that is no NVIDIA GPU, where none runs.
      dtype: dtype of x.
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
      UserError: no implementation that the config allows runs on the device.
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
    """Returns the result of `choose_kernel`, after a test of the kernels on the device.

    If a kernel that `pick` may return gives wrong products, the result is xla.

    Args:
      config: config of the run, or of the model alone.
      device: device on which the kernels are tested.
      warn: function that receives a line for the user.

    Raises:
      UserError: no implementation that the config allows runs on the device.
      RunFailed: the config requires a kernel, by its name or by materialize "never", and this
        kernel gives wrong products on the device.
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
"""Numbers of rows to check, one for each kind of tile."""


def agrees(implementation: str, dtype: DTypeLike) -> bool:
    """Returns whether products in both directions equal those of xla, up to rounding in `dtype`.

    Drivers, compilers and GPUs can differ from those that a kernel was tested on. Without this
    check, the only sign of a wrong product would be a model that learns badly.
    """
    random = np.random.default_rng(0)
    stack = quantize(random.normal(size=(2, *CHECKED_SHAPE)).astype(np.float32))
    second = QLayer(stack, jnp.int32(1))  # the same form as in a model
    # five values are rounded: codebook, scale, their product, the sum and the result
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
    with ThreadPoolExecutor(len(programs)) as pool:  # compiling for a GPU takes seconds per program
        compiled = list(pool.map(jax.stages.Lowered.compile, programs))
    for (x, g), ours, reference in zip(inputs, compiled[::2], compiled[1::2]):
        for y, expected in zip(ours(x, g), reference(x, g)):
            wide, exact = (np.asarray(a, np.float64) for a in (y, expected))
            if not np.abs(wide - exact).max() <= tolerance * np.abs(exact).max():
                return False
    return True
