"""Checks that fresh adapters do not change the output of any module."""

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

TOLERANCE = {"lora": 0.0}
"""Largest change of a product x @ W by a fresh adapter of a variant, relative to the product's
largest absolute value; `ROUNDING` for all other variants."""

ROUNDING = 1e-5
"""DoRA multiplies by the quotient of two equal norms, which a GPU computes to within two units in
the last place of float32. On a CPU, and in 16 bits, the quotient is exactly one."""

ROWS = 16
"""Rows of the random test input of each linear."""


def starts_as_base(config: Config) -> bool:
    """Returns whether the adapters are fresh: not read from files, not computed from weights."""
    return config.lora.from_adapter is None and config.lora.init not in INITIALIZERS


def tolerance_of(variant: str) -> float:
    """Returns the largest relative change of a product by a fresh adapter of this variant."""
    return TOLERANCE.get(variant, ROUNDING)


def check_identity(
    graph: nnx.GraphDef,
    trained: Any,
    frozen: Any,
    config: Config,
    layout: MeshLayout | None = None,
) -> None:
    """Checks that fresh adapters change no linear's product by more than its tolerance.

    The adapters of embedding and head must add exactly zero.

    Args:
      graph: structure of the model, from `trees.split`.
      trained: trained tree.
      frozen: frozen tree.
      config: config of the run, with the adapter variant and the compute dtype.
      layout: split of the model over a mesh; None for one device.

    Raises:
      RunFailed: an adapter changes a product; the message names the first such module.
    """
    dtype = jnp.dtype(config.model.compute_dtype)
    tolerance = tolerance_of(config.lora.variant)
    model = nnx.merge(graph, trained, frozen)
    found = jax.device_get(unchanged(graph, trained, frozen, dtype, tolerance, layout))
    name = first_changed(model, found) or first_added(model, dtype)
    if name is not None:
        raise RunFailed(
            f"fresh adapters change the model's output, first at {name}; this is a bug, "
            "please report it"
        )


def first_changed(model: Decoder, found: Sequence[Mapping[str, np.ndarray]]) -> str | None:
    """Returns the checkpoint's name of the first linear whose product changed; None if none did.

    Args:
      model: decoder with adapters.
      found: result of `unchanged` for this model, as NumPy arrays.
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
    """Returns the path of the first embedding or head adapter whose product is not zero, or None.

    Args:
      model: decoder with adapters.
      dtype: dtype of the head's test input, [16, hidden] drawn from N(0, 1).
    """
    for path, adapter in model.outer_adapters().items():
        if path == HEAD:
            x = jax.random.normal(jax.random.key(0), (ROWS, model.config.hidden_size), dtype)
            added = adapter(x, None)
        else:
            # all rows of A, and the product of the first row with B, which shows a NaN in B
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
    """Compares x @ W with and without the adapter, for every linear that has an adapter.

    Both sides of the comparison use the same product x @ W, in one program. Two programs may use
    different matmul algorithms on a GPU, because XLA chooses by timing. Then their results would
    differ in the last bits although the adapter adds zero.

    Args:
      graph: structure of the model.
      trained: trained tree.
      frozen: frozen tree.
      dtype: dtype of x [16, in], which is drawn from N(0, 1).
      tolerance: largest difference, relative to the largest absolute value of x @ W.
      layout: split of both trees over a mesh; None for one device.

    Returns:
      For each run of the model, a map from a linear's path below the layer to bool[L]: True for
      each layer whose product is unchanged, False if a value is NaN.
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
        return compared(*layout.local_parts(trained, frozen))

    specs = layout.specs(trained, frozen)
    return on_devices(layout.mesh, on_a_device, specs, PartitionSpec())(trained, frozen)


def _unchanged(linear: LoraLinear, dtype: jnp.dtype, tolerance: float) -> jax.Array:
    graph, stacks = nnx.split(linear)
    x = jax.random.normal(jax.random.key(0), (ROWS, linear.weight.get_value().shape[-2]), dtype)

    def one(layer: Any) -> jax.Array:
        linear = nnx.merge(graph, layer)
        # Without the barrier, XLA could add to a 16-bit product before the product is rounded.
        before = jax.lax.optimization_barrier(linear.multiply(x))

        def multiply(y: jax.Array) -> jax.Array:
            return before if y is x else linear.multiply(y)

        after = cast(Adapter, linear.adapter).product(x, multiply, None).astype(jnp.float32)
        before = before.astype(jnp.float32)
        limit = tolerance * jnp.abs(before).max()
        # `==` because inf - inf is NaN; both compare False for NaN, which a CPU's max may ignore
        return jnp.all((after == before) | (jnp.abs(after - before) <= limit))

    return jax.lax.map(one, stacks)
