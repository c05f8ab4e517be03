"""Builds kernels and their independent reference: plain JAX on the whole float weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import init_adapter
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variants import VARIANTS
from qlora_jax.modules.adapters import restack
from qlora_jax.modules.axes import MATRIX, from_matrices, matrices_shape, to_matrices
from qlora_jax.modules.kernel import Kernel
from qlora_jax.quant import quantize, to_float32

SPEC = AdapterSpec(3, 6, 2.0)


class Made(NamedTuple):
    """A kernel, its trained arrays, and a function from these arrays to the whole weight.

    `whole` is plain JAX, so JAX can differentiate it; it is the reference of the tests.
    """

    kernel: Kernel
    trained: dict[str, jax.Array]
    whole: Any

    def with_trained(self, trained):
        """Returns the kernel with the given values of A, B and DoRA's magnitude."""
        if not trained:
            return self.kernel
        adapter = jax.tree.map(lambda x: x, self.kernel.adapters["default"])
        for name, value in trained.items():
            getattr(adapter, name).set_value(value)
        return Kernel(
            self.kernel.value,
            {"default": adapter},
            {"default": None},
            self.kernel.axes,
            self.kernel.shape,
            self.kernel.dtype,
        )


def kernel_of(shape, axes=MATRIX, stack=(), quantized=True, variant=None, dtype="float32"):
    random = np.random.default_rng(7)
    draw = lambda *sizes: 0.3 * random.normal(size=sizes).astype(np.float32)  # noqa: E731
    weight = jnp.asarray(draw(*stack, *shape), dtype)
    matrices = to_matrices(weight, axes)
    stored = quantize(matrices, block_size=32) if quantized else matrices
    plain = jax.jit(to_float32)(stored)
    value = stored if quantized else weight
    lead = plain.shape[:-2]
    assert lead == (*stack, *matrices_shape(axes, shape)[:-2])
    if variant is None:

        def base(_):
            return from_matrices(plain, axes, shape)

        return Made(Kernel(value, {}, {}, axes, shape, jnp.dtype(dtype)), {}, base)
    count, (k, n) = int(np.prod(lead)), plain.shape[-2:]
    adapter = init_adapter(jax.random.key(0), [SPEC] * count, k, n, "gaussian", 0.0, jnp.float32)
    adapter.b.set_value(jnp.asarray(draw(count, SPEC.rank, n)))
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(lead) :]), stored)
    adapter = VARIANTS[variant](adapter, flat)
    names = ["a", "b"] + ["magnitude"] * (variant == "dora")
    if variant == "dora":
        adapter.magnitude.set_value(adapter.magnitude.get_value() + 0.2 * abs(draw(count, n)))
    restack(adapter, 1, lead)
    trained = {name: getattr(adapter, name).get_value() for name in names}
    keys = {"default": None}
    kernel = Kernel(value, {"default": adapter}, keys, axes, shape, jnp.dtype(dtype))

    def whole(trained):
        w = plain + SPEC.scale * trained["a"] @ trained["b"]
        if variant == "dora":
            # the gradient treats the norm as a constant (DoRA, section 4.3)
            norm = jax.lax.stop_gradient(jnp.linalg.norm(w, axis=-2))
            w = w * (trained["magnitude"] / norm)[..., None, :]
        return from_matrices(w, axes, shape)

    return Made(kernel, trained, whole)


@pytest.fixture(scope="session")
def make_kernel():
    """Returns `kernel_of`, which makes a `Made` of random values from the shape of a layer."""
    return kernel_of
