"""Linears with one input and one call for all products with W equal each linear alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.kernels import matmul
from qlora_jax.lora import linear as module
from qlora_jax.lora.linear import LoraLinear, side_by_side
from qlora_jax.quant import quantize

K = 64


class Doubly(nnx.Module):
    """An adapter that needs a second product with W besides x @ W, as DoRA does."""

    def product(self, x, multiply, key):
        return multiply(x) + multiply(jnp.ones((1, K), x.dtype))


def linears(quantized: bool) -> list[LoraLinear]:
    random = np.random.default_rng(0)

    def weight(n: int):
        w = random.normal(size=(K, n)).astype(np.float32)
        return quantize(w) if quantized else jnp.asarray(w)

    adapted = LoraLinear.from_weight(weight(16), jnp.ones(16), key=jax.random.key(0), rank=4)
    adapted.adapter.b.set_value(jnp.ones((4, 16)))
    double = LoraLinear(weight(16))
    double.adapter = nnx.data(Doubly())
    return [LoraLinear(weight(16)), adapted, double]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.quick
def test_they_are_those_alone(monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    calls = []

    def many(x, qs, implementation):
        calls.append(len(qs))
        return [matmul(x, q, implementation) for q in qs]

    monkeypatch.setattr(module, "matmul_many", many)
    all_linears, keys = linears(quantized), [None] * 3
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, K)), jnp.float32)
    together = side_by_side(all_linears, x, keys)
    assert calls == ([3] if quantized else [])
    for y, linear in zip(together, all_linears, strict=True):
        np.testing.assert_array_equal(y, linear(x))


def test_what_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = linears(True)[1]
    x = jnp.ones((2, K))
    expected = linear(x)
    known = linear.multiply(x)
    monkeypatch.setattr(module, "matmul", None)
    np.testing.assert_array_equal(linear(x, None, known), expected)


def test_different_implementations_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_many", None)
    all_linears = linears(True)
    all_linears[0].implementation = "xla"
    x = jnp.ones((2, K))
    for y, linear in zip(side_by_side(all_linears, x, [None] * 3), all_linears, strict=True):
        np.testing.assert_array_equal(y, linear(x))
