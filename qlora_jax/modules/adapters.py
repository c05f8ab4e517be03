"""Makes and switches adapters of weights with any leading axes, such as layers and experts."""

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
"""Setting of the section `lora` that these functions refuse, to what replaces the setting."""


def lora_settings(**values: Any) -> LoraConfig:
    """Returns the config of adapters.

    Args:
      values: settings of the section `lora`, such as rank=16, init="gaussian".

    Raises:
      UserError: a setting is unknown, or a value has the wrong type.
    """
    for name in values.keys() & ELSEWHERE.keys():
        raise UserError(f"{name}: {ELSEWHERE[name]}; remove it")
    return section("lora", values)


def names_of(path: str) -> tuple[str, str]:
    """Returns the paths of a weight and of its module; `rank_pattern` may match either of them."""
    return path, path.rpartition(".")[0]


def make_adapter(
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
      lora: settings of the adapter.
      spec: rank, alpha and scale.
      key: key of the random numbers.
      quantization: arguments of `quant.quantize`, for init "loftq".

    Returns:
      The weight to store (init pissa and loftq change the weight), and the adapter, whose arrays
      have the same leading axes [*stack].

    Raises:
      UserError: init is pissa or loftq and the weight is in 4 bits, or init is loftq without
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
        flat = _fill_from_weight(path, flat, lora, spec, adapter, quantization)
    adapter = VARIANTS[lora.variant](adapter, flat)
    restack(adapter, 1, stack)
    if lora.dropout:
        adapter.keys = nnx.data(DropoutKeys(drop, tuple(stack)))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), flat), adapter


def _fill_from_weight(
    path: str,
    weight: StoredWeight,
    lora: LoraConfig,
    spec: AdapterSpec,
    adapter: Adapter,
    quantization: Mapping[str, Any] | None,
) -> StoredWeight:
    """Computes an adapter's values from a weight [L, K, N]; returns the weight to store."""
    if isinstance(weight, QTensor):
        raise UserError(
            f"{path}: init {lora.init} needs a 16-bit weight, and this weight is in 4 bits; "
            "add adapters before quantize_model"
        )
    if lora.init == "loftq" and quantization is None:
        raise UserError(
            'init loftq needs the error of quantization; give quantization={"codebook": "nf4"}'
        )
    dtype = weight.dtype

    def store(w: jax.Array) -> StoredWeight:
        if lora.init != "loftq":
            return w.astype(dtype)
        return quantize(w, name=path, **(quantization or {}))

    initialize, parts, values = INITIALIZERS[lora.init], [], []
    for one in weight:
        given = InitInput(
            one.astype(jnp.float32), spec, jnp.dtype(lora.dtype), store, lora.loftq_iterations
        )
        stored, value = initialize(given)
        parts.append(stored)
        values.append(value)
    adapter.fill(values)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def restack(adapter: Adapter, axes: int, stack: Sequence[int]) -> None:
    """Reshapes the leading axes of an adapter's arrays, in place.

    Args:
      adapter: adapter to change.
      axes: number of leading axes to replace.
      stack: sizes of the new leading axes.
    """
    for variable in vars(adapter).values():
        if isinstance(variable, nnx.Variable):
            value = variable.get_value()
            variable.set_value(value.reshape(*stack, *value.shape[axes:]))


def is_on(adapter: Adapter) -> bool:
    """Checks if an adapter is on: its scale is not zero."""
    return bool(jnp.any(adapter.scale.get_value() != 0))


def check_together(path: str, adapters: Mapping[str, Adapter]) -> None:
    """Raises UserError if a DoRA adapter would be on together with another adapter of the weight.

    DoRA trains the lengths of the columns of W + s·A·B, so they hold for one adapter only.

    Args:
      path: path of the weight, for the error.
      adapters: adapters to switch on, by name.
    """
    if len(adapters) > 1 and any(isinstance(x, DoraAdapter) for x in adapters.values()):
        raise UserError(
            f"{path}: adapters {', '.join(adapters)} cannot be on at once, because a DoRA adapter "
            "must be on alone; first switch the others off by use_adapter"
        )


def on_with(adapters: Mapping[str, Adapter], name: str, adapter: Adapter) -> dict[str, Adapter]:
    """Returns the adapters of a weight that are on after `adapter` is added as `name`."""
    return {**{k: x for k, x in adapters.items() if k != name and is_on(x)}, name: adapter}


def strength(adapter: Adapter, active: bool) -> None:
    """Switches an adapter on or off, in place: sets its scale to that of its specs, or to 0."""
    shape = adapter.scale.get_value().shape
    scales = [spec.scale if spec and active else 0.0 for spec in adapter.specs]
    adapter.scale.set_value(jnp.array(scales, jnp.float32).reshape(shape))
