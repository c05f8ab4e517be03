"""Decoded weights are not saved for the backward pass, and not decoded before their use."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from selection import mostly_slow

import qlora_jax as qj

D = 128
LAYERS = 6
DECODED = 4 * D * 4 * D
"""Bytes of a weight in float32."""
IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Without it XLA:CPU runs independent operations at the same time; a GPU does not."""


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 4 * D, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        through = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(lambda x, layer: layer(x))
        return through(x, self.layers)


def parts(model, variant="lora"):
    made = model(nnx.Rngs(0))
    qj.quantize_model(made, ".*kernel")
    qj.add_lora(made, ".*kernel", rank=2, variant=variant, rngs=nnx.Rngs(1))
    return qj.split(made)


def loss(graph):
    return lambda lora, frozen, x: jnp.sum(qj.join(graph, lora, frozen)(x) ** 2)


X = jnp.ones((4, D))


@pytest.mark.quick
@pytest.mark.parametrize("model", mostly_slow([Unrolled, Scanned], Unrolled))
@pytest.mark.parametrize("variant", mostly_slow(["lora", "dora"], "lora"))
def test_no_residual_has_a_weights_size(model, variant):
    graph, lora, frozen = parts(model, variant)
    backward = jax.eval_shape(
        lambda lora: jax.vjp(lambda a: loss(graph)(a, frozen, X), lora)[1], lora
    )
    kept = jax.tree.leaves(backward)
    assert kept
    sizes = [x.size for x in kept if jnp.issubdtype(x.dtype, jnp.floating)]
    assert max(sizes) < D * 4 * D


@pytest.mark.parametrize("model", mostly_slow([Unrolled, Scanned], Unrolled))
def test_a_step_decodes_one_weight_at_a_time(model):
    """Temporary memory holds one decoded weight and the activations: no pass keeps a weight."""
    graph, lora, frozen = parts(model)
    step = jax.jit(jax.value_and_grad(loss(graph))).lower(lora, frozen, X)
    temporary = step.compile(IN_ORDER).memory_analysis().temp_size_in_bytes
    activations = LAYERS * 3 * X.size * 4 * 4
    assert temporary < 1.2 * DECODED + activations


def test_the_backward_pass_decodes_again():
    """Counts the decodings in a step: the backward pass decodes again, and reuses no weight."""
    graph, lora, frozen = parts(Unrolled)
    step = jax.jit(jax.value_and_grad(loss(graph))).lower(lora, frozen, X)
    text = step.compile(IN_ORDER).as_text()
    decoded = re.findall(rf"= f32\[(?:{D},{4 * D}|{4 * D},{D})\]\S* fusion\(", text)
    # 2 per layer and pass; not the first weight in the backward pass: x needs no gradient
    assert len(decoded) == 4 * LAYERS - 1
