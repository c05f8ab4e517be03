"""Quantizes, adapts and merges the weights in a Linen module's params."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import linen as nn

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.spec import check_patterns, spec_of
from qlora_jax.lora.where import Where
from qlora_jax.modules.adapters import (
    check_together,
    lora_settings,
    make_adapter,
    names_of,
    on_with,
)
from qlora_jax.modules.axes import from_matrices
from qlora_jax.modules.checks import (
    check_adapter,
    check_floats,
    check_merged,
    check_not_tables_alone,
    check_values,
)
from qlora_jax.modules.kernel import Kernel, whole
from qlora_jax.modules.linen.choice import ChosenWeight, Given, weights
from qlora_jax.modules.linen.params import Params, check_module, kernels_of, replaced
from qlora_jax.modules.quantizing import quantized
from qlora_jax.quant import QTensor

VALUES = "give params with values, such as those of module.init"
"""Advice to the user in the error about an abstract weight."""


def quantize(
    module: nn.Module,
    params: Params,
    where: Where,
    *example: Any,
    embeddings: bool = False,
    axes: Given = MappingProxyType({}),
    **quantization: Any,
) -> Any:
    """Quantizes weights of a module to 4 bits (QLoRA, section 3).

    Args:
      module: Linen module.
      params: params of the module, such as module.init(key, x)["params"].
      where: weights to quantize: a regular expression that matches the whole dotted path, a list of
        names that occur in paths, or a function (path, array) to bool.
      example: arguments of one abstract call, which computes nothing and shows the axes that
        products sum over. Weights that no product and no look-up uses stay unchanged, with a
        warning.
      embeddings: True also quantizes tables whose rows are looked up, such as `nn.Embed`'s.
      axes: path of a weight to its axes: the result of `discover`, or an einsum of input and weight
        such as "...k,kn->...n". With `axes` for all weights, leave `example` out.
      quantization: arguments of `quant.quantize`: codebook, block_size, double_quant,
        nested_block.

    Returns:
      New params, with a `Kernel` in place of each quantized weight.

    Raises:
      UserError: `where` matches nothing; a weight has unknown axes, is in 4 bits already, is
        abstract or is not finite; or an argument is not allowed.

    Example:
      ```python
      params = qj.linen.quantize(module, params, ".*kernel", x, codebook="nf4")
      ```
    """
    asked = weights(check_module(module), params, where, example, axes)
    found = [weight for weight in asked if embeddings or not weight.table]
    check_not_tables_alone(found, where)
    values: dict[str, Any] = {weight.path: weight.kernel.value for weight in found}
    for path, value in values.items():
        check_values(path, value, VALUES)
        check_floats(path, value)
    new = {}
    for path, kernel, _ in found:
        q = quantized(values[path], kernel.known, path, **quantization)
        new[path] = dataclasses.replace(kernel, value=q)
    return replaced(params, lambda path, leaf: new.get(path, leaf))


def add_lora(
    module: nn.Module,
    params: Params,
    where: Where,
    *example: Any,
    key: jax.Array,
    rank: int = 16,
    alpha: float = 32.0,
    name: str = "default",
    axes: Given = MappingProxyType({}),
    quantization: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Adds adapters to weights of a module (LoRA, section 4.1).

    The adapted weight is W + s·A·B; variant dora also trains the length of each of its columns.
    Until the adapters are trained, the module computes the same as before, except with init pissa
    and loftq. These two need weights in 16 bits: call add_lora with pissa before `quantize`; with
    loftq add_lora quantizes the weights itself.

    Args:
      module: Linen module.
      params: params of the module; weights may be in 4 bits.
      where: weights to adapt, as in `quantize`; a function gets the path and the array or `Kernel`.
      example: arguments of a call, as in `quantize`; weights in 4 bits do not need an example.
      key: key of the random numbers of A.
      rank: rank r of the adapters: A is [*stack, *batch, K, r] and B is [*stack, *batch, r, N] for
        a weight of matrices [*stack, *batch, K, N].
      alpha: numerator of the scale; by default s = alpha / r.
      name: name of the adapter; a weight can have several adapters with different names.
      axes: path of a weight to its axes, as in `quantize`.
      quantization: arguments of `quant.quantize`, only for init loftq.
      settings: other settings of the section `lora`: variant, scaling, init, dropout, dtype,
        freeze_a, rank_pattern, alpha_pattern, loftq_iterations. Patterns match the end of a path.

    Returns:
      New params, with a `Kernel` in place of each adapted weight.

    Raises:
      UserError: `where` matches nothing; a weight has unknown axes, is abstract or has an adapter
        of this name; or a setting is not allowed.

    Example:
      ```python
      key = jax.random.key(1)
      params = qj.linen.add_lora(module, params, ["query", "value"], x, rank=16, key=key)
      ```
    """
    found = weights(check_module(module), params, where, example, axes)
    lora = lora_settings(rank=rank, alpha=alpha, **settings)
    for path, kernel, table in found:
        check_values(path, kernel.value, VALUES)
        check_adapter(path, kernel.value, table, lora, name, kernel.adapters)
    check_patterns(lora, [own for weight in found for own in names_of(weight.path)])
    new = {}
    for i, weight in enumerate(found):
        spec = spec_of(lora, *names_of(weight.path))
        own = jax.random.fold_in(key, i)
        stored, adapter = make_adapter(weight.path, weight.matrices, lora, spec, own, quantization)
        check_together(weight.path, on_with(weight.kernel.adapters, name, adapter))
        new[weight.path] = _with(
            weight, stored if lora.init in INITIALIZERS else None, name, adapter
        )
    return replaced(params, lambda path, leaf: new.get(path, leaf))


def _with(weight: ChosenWeight, stored: Any, name: str, adapter: Adapter) -> Kernel:
    """Returns a weight with a new adapter; `stored`, if given, is its new value."""
    kernel = weight.kernel
    adapter.keys = None  # `apply` is given the key
    value = kernel.value
    if stored is not None:
        axes, shape = kernel.known, kernel.shape
        value = stored if isinstance(stored, QTensor) else from_matrices(stored, axes, shape)
    return dataclasses.replace(kernel, value=value, adapters={**kernel.adapters, name: adapter})


def merge(params: Params) -> Any:
    """Returns params of plain arrays: weights decoded, and merged with their adapters.

    Raises:
      UserError: the params have no adapters and no weight in 4 bits.
    """
    check_merged(kernels_of(params))
    return replaced(params, lambda _, leaf: whole(leaf) if isinstance(leaf, Kernel) else leaf)
