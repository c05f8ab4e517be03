"""Whether fresh adapters leave what every module computes as it was."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qlora_jax.config import Config
from qlora_jax.lora import Adapter, LoraLinear
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.models.decoder import Decoder, run_length
from qlora_jax.models.families import HEAD
from qlora_jax.models.sharding import MeshLayout
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.runtime.mesh import on_devices

TOLERANCE = {"lora": 0.0, "dora": 1e-5}
"""How far a fresh adapter may move a product, in units of the product's largest number. DoRA
multiplies by norms divided by themselves, which a GPU computes to within two units in the last
place of float32. On a CPU, and in 16 bits, the quotient is one."""

ROWS = 16
"""Rows of the input that each linear is tried with."""


def starts_as_base(config: Config) -> bool:
    """Whether the adapters change nothing: fresh ones, not read or taken from the weights."""
    return config.lora.from_adapter is None and config.lora.init not in INITIALIZERS


def check_identity(
    graph: nnx.GraphDef,
    trained: Any,
    frozen: Any,
    config: Config,
    layout: MeshLayout | None = None,
) -> None:
    """Checks that fresh adapters change no linear's product by more than `TOLERANCE`.

    Those of embedding and head must add nothing at all.

    Args:
      graph: the model's structure, from `trees.split`.
      trained: its trained tree.
      frozen: its frozen tree.
      config: names the variant and the compute dtype.
      layout: how the model is split over a mesh; None is one device.

    Raises:
      RunFailed: an adapter changes a product; the message names the first such linear.
    """
    dtype, tolerance = jnp.dtype(config.model.compute_dtype), TOLERANCE[config.lora.variant]
    model = nnx.merge(graph, trained, frozen)
    found = jax.device_get(unchanged(graph, trained, frozen, dtype, tolerance, layout))
    name = first_changed(model, found) or first_added(model, dtype)
    if name is not None:
        raise RunFailed(
            f"fresh adapters change the model's output, first at {name}; this is a bug, "
            "please report it"
        )


def first_changed(model: Decoder, found: Sequence[Mapping[str, np.ndarray]]) -> str | None:
    """Returns the checkpoint's name of the first linear whose product changed; None without one.

    Args:
      model: a decoder.
      found: the result of `unchanged` for this model, as NumPy arrays.
    """
    by_layer = [
        (run, same, i) for run, same in zip(model.runs, found) for i in range(run_length(run))
    ]
    for layer, (run, same, i) in enumerate(by_layer):
        for path in run.linears():
            if path in same and not same[path][i]:
                return f"{model.config.names.layers}.{layer}.{path}"
    return None


def first_added(model: Decoder, dtype: jnp.dtype) -> str | None:
    """Returns the path of the first adapter of embedding or head that adds something, or None.

    Args:
      model: a decoder.
      dtype: of what the head is tried with, [16, hidden] drawn from N(0, 1).
    """
    for path, adapter in model.outer_adapters().items():
        if path == HEAD:
            x = jax.random.normal(jax.random.key(0), (ROWS, model.config.hidden_size), dtype)
            added = adapter(x, None)
        else:
            # every row of A; and B, which may hold NaN, by what the first row gives
            a, first = adapter.a.get_value(), adapter.looked_up(jnp.arange(1), dtype)
            added = jnp.concatenate([a.reshape(-1), first.reshape(-1)])
        if not bool(jnp.all(added == 0)):
            return path
    return None


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def unchanged(
    graph: nnx.GraphDef,
    trained: Any,
    frozen: Any,
    dtype: jnp.dtype,
    tolerance: float,
    layout: MeshLayout | None = None,
) -> list[dict[str, jax.Array]]:
    """Compares x @ W with and without the adapter, for every linear that has one.

    It is one program, in which both sides read one product of x and W. Two programs may multiply
    by different algorithms, since XLA picks a GPU's by timing them, and then their results differ
    in the last bits although the adapter adds zero.

    Args:
      graph: the model's structure.
      trained: its trained tree.
      frozen: its frozen tree.
      dtype: of x [16, in], which is drawn from N(0, 1).
      tolerance: the largest difference, in units of the largest number of x @ W.
      layout: how both trees are split over a mesh; None is one device.

    Returns:
      For each of the model's runs the linears' paths below the layer, each with bool[L]: whether
      that layer's product is unchanged. False where a number is NaN.
    """

    def compared(trained: Any, frozen: Any) -> list[dict[str, jax.Array]]:
        model: Decoder = nnx.merge(graph, trained, frozen)
        return [
            {
                path: _unchanged(linear, dtype, tolerance)
                for path, linear in run.linears().items()
                if linear.adapter is not None
            }
            for run in model.runs
        ]

    if layout is None:
        return compared(trained, frozen)

    def on_a_device(trained: Any, frozen: Any) -> list[dict[str, jax.Array]]:
        return compared(*layout.in_parts(trained, frozen))

    specs = layout.specs(trained, frozen)
    return on_devices(layout.mesh, on_a_device, specs, PartitionSpec())(trained, frozen)


def _unchanged(linear: LoraLinear, dtype: jnp.dtype, tolerance: float) -> jax.Array:
    graph, stacks = nnx.split(linear)
    x = jax.random.normal(jax.random.key(0), (ROWS, linear.weight.get_value().shape[-2]), dtype)

    def one(layer: Any) -> jax.Array:
        linear = nnx.merge(graph, layer)
        # Kept whole: else a product in 16 bits could go into the sum before it is rounded.
        before = jax.lax.optimization_barrier(linear.multiply(x))

        def multiply(y: jax.Array) -> jax.Array:
            return before if y is x else linear.multiply(y)

        after = cast(Adapter, linear.adapter).product(x, multiply, None).astype(jnp.float32)
        before = before.astype(jnp.float32)
        limit = tolerance * jnp.abs(before).max()
        # equal infinities have no difference; a maximum on a CPU may leave NaN out
        return jnp.all((after == before) | (jnp.abs(after - before) <= limit))

    return jax.lax.map(one, stacks)
