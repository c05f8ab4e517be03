"""Adapters for matrices with any number of axes in front: layers, experts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import LoraConfig
from qlora_jax.config.tree import section
from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.dropout import DropoutKeys
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.initializers.decompose import InitInput
from qlora_jax.lora.initializers.random_init import init_adapter
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variants import VARIANTS
from qlora_jax.lora.variants.dora import DoraAdapter
from qlora_jax.quant import QTensor, quantize
from qlora_jax.runtime.errors import UserError

StoredWeight = jax.Array | QTensor

ELSEWHERE = {
    "target_modules": "`where` chooses the weights",
    "from_adapter": "load_adapter reads an adapter",
}
"""Settings of the section `lora` that the library has otherwise."""


def lora_settings(**values: Any) -> LoraConfig:
    """Returns the settings of adapters.

    Args:
      values: settings of the section `lora`, such as rank=16, init="gaussian".

    Raises:
      UserError: an unknown setting, or a value of the wrong type.
    """
    for name in values.keys() & ELSEWHERE.keys():
        raise UserError(f"{name}: {ELSEWHERE[name]}; remove it")
    return section("lora", values)


def names_of(path: str) -> tuple[str, str]:
    """Returns the paths of a weight and of its module: a rank's pattern may mean either."""
    return path, path.rpartition(".")[0]


def made(
    path: str,
    weight: StoredWeight,
    lora: LoraConfig,
    spec: AdapterSpec,
    key: jax.Array,
    quantization: Mapping[str, Any] | None = None,
) -> tuple[StoredWeight, Adapter]:
    """Makes the adapter of a weight.

    Args:
      path: path of the weight, for errors.
      weight: matrices [*stack, K, N].
      lora: settings.
      spec: rank, alpha and scale.
      key: key of the random numbers.
      quantization: arguments of `quant.quantize`, for init "loftq".

    Returns:
      What is stored of the weight from now on, and the adapter, whose arrays have the same
      [*stack] in front.

    Raises:
      UserError: an init that starts from 16-bit weights, for 4-bit ones, or loftq without
        `quantization`.
    """
    *stack, k, n = weight.shape
    count = math.prod(stack)
    own, drop = jax.random.split(key)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(stack) :]), weight)
    dtype = jnp.dtype(lora.dtype)
    specs = [spec] * count
    adapter = init_adapter(own, specs, k, n, lora.init, lora.dropout, dtype, lora.freeze_a)
    if lora.init in INITIALIZERS:
        flat = _started(path, flat, lora, spec, adapter, quantization)
    adapter = VARIANTS[lora.variant](adapter, flat)
    restack(adapter, 1, stack)
    if lora.dropout:
        adapter.keys = nnx.data(DropoutKeys(drop, tuple(stack)))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), flat), adapter


def _started(
    path: str,
    weight: StoredWeight,
    lora: LoraConfig,
    spec: AdapterSpec,
    adapter: Adapter,
    quantization: Mapping[str, Any] | None,
) -> StoredWeight:
    """Fills an adapter from a weight [L, K, N], and returns what is stored of the weight."""
    if isinstance(weight, QTensor):
        raise UserError(
            f"{path}: init {lora.init} starts from 16-bit weights, and this one is in 4 bits; "
            "add adapters before quantize_model"
        )
    if lora.init == "loftq" and quantization is None:
        raise UserError(
            'init loftq starts from what quantizing loses; give quantization={"codebook": "nf4"}'
        )
    dtype = weight.dtype

    def store(w: jax.Array) -> StoredWeight:
        if lora.init != "loftq":
            return w.astype(dtype)
        return quantize(w, name=path, **(quantization or {}))

    start, parts, values = INITIALIZERS[lora.init], [], []
    for one in weight:
        wide = one.astype(jnp.float32)
        task = InitInput(wide, spec, jnp.dtype(lora.dtype), store, lora.loftq_iterations)
        stored, value = start(task)
        parts.append(stored)
        values.append(value)
    adapter.fill(values)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def restack(adapter: Adapter, axes: int, stack: Sequence[int]) -> None:
    """Replaces the first axes of an adapter's arrays, in place.

    Args:
      adapter: the adapter.
      axes: how many are replaced.
      stack: sizes of those that take their place.
    """
    for variable in vars(adapter).values():
        if isinstance(variable, nnx.Variable):
            value = variable.get_value()
            variable.set_value(value.reshape(*stack, *value.shape[axes:]))


def is_on(adapter: Adapter) -> bool:
    """Returns whether an adapter adds anything: its scale is not zero."""
    return bool(jnp.any(adapter.scale.get_value() != 0))


def check_together(path: str, adapters: Mapping[str, Adapter]) -> None:
    """Raises UserError if adapters of a weight cannot be on at once: DoRA's lengths are for one.

    Args:
      path: path of the weight.
      adapters: those that are to be on, by name.
    """
    if len(adapters) > 1 and any(isinstance(x, DoraAdapter) for x in adapters.values()):
        raise UserError(
            f"{path}: adapters {', '.join(adapters)} cannot be on at once, since a DoRA adapter is "
            "on alone; switch others off by use_adapter before"
        )


def on_with(adapters: Mapping[str, Adapter], name: str, adapter: Adapter) -> dict[str, Adapter]:
    """Returns the adapters of a weight that are on once it has one more."""
    return {**{k: x for k, x in adapters.items() if k != name and is_on(x)}, name: adapter}


def strength(adapter: Adapter, active: bool) -> None:
    """Switches an adapter on or off, in place: its scale becomes that of its specs, or zero."""
    shape = adapter.scale.get_value().shape
    scales = [spec.scale if spec and active else 0.0 for spec in adapter.specs]
    adapter.scale.set_value(jnp.array(scales, jnp.float32).reshape(shape))
