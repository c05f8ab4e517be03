"""Does an implementation compute what it should on the device at hand?

Drivers, compilers and GPUs differ from those a kernel was tested on, and a wrong product would
only show as a model that learns badly.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.kernels.matmul import matmul
from qlora_jax.quant import quantize

SHAPE = (512, 384)
ROWS = (3, 40, 200)
"""One for each kind of tile."""


def agrees(implementation: str, dtype: jax.typing.DTypeLike) -> bool:
    """Whether its products and gradients are those of xla, within the rounding of `dtype`."""
    random = np.random.default_rng(0)
    q = quantize(random.normal(size=SHAPE).astype(np.float32))
    # codebook, scale, their product, the sum and the result are rounded
    tolerance = 8 * float(jnp.finfo(dtype).eps)

    def both(implementation: str, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: matmul(x, q, implementation), x)
        return y, pull(g)[0]

    inputs = [
        tuple(jnp.asarray(random.normal(size=(rows, size)), dtype) for size in SHAPE)
        for rows in ROWS
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
