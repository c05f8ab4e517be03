"""Weights of a Linen module's params in 4 bits, with adapters, and as plain arrays again."""

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
from qlora_jax.modules.adapters import check_together, lora_settings, made, names_of, on_with
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
"""What to do with weights that are abstract."""


def quantize(
    module: nn.Module,
    params: Params,
    where: Where,
    *example: Any,
    embeddings: bool = False,
    axes: Given = MappingProxyType({}),
    **quantization: Any,
) -> Any:
    """Stores weights of a module in 4 bits (QLoRA, section 3).

    Args:
      module: a Linen module.
      params: its params, such as module.init(key, x)["params"].
      where: which weights, by their dotted paths (`lora.where.Where`); a function gets the path
        and the array.
      example: arguments of a call, by which it is found which axes are summed over. The call is
        abstract: nothing is computed. Weights that no product and no look-up has are left alone,
        with a warning.
      embeddings: whether tables that are looked up, such as `nn.Embed`'s, are quantized, too.
      axes: path of a weight to its axes, what `discover` has returned or an einsum of an input and
        the weight such as "...k,kn->...n"; with it `example` may be left out.
      quantization: arguments of `quant.quantize`: codebook, block_size, double_quant,
        nested_block.

    Returns:
      New params, with a `Kernel` in the place of each of these weights.

    Raises:
      UserError: `where` matches nothing, or weights whose axes are not known, that are in 4 bits
        already, abstract, or not finite; an argument that cannot be used.
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
    """Puts adapters on weights of a module (LoRA, section 4.1).

    The module computes the same as before until the adapters are trained, unless `init` is pissa or
    loftq. Those go on weights in 16 bits: pissa before `quantize`, loftq in its place.

    Args:
      module: a Linen module.
      params: its params; weights may be in 4 bits.
      where: which weights, by their dotted paths (`lora.where.Where`); a function gets the path
        and the array or `Kernel`.
      example: arguments of a call, as in `quantize`; weights in 4 bits need none.
      key: key of the random numbers of A.
      rank: r.
      alpha: numerator of the scale.
      name: name of the adapter; a weight can have several.
      axes: as in `quantize`.
      quantization: arguments of `quant.quantize` for init loftq.
      settings: other settings of the section `lora`: variant, scaling, init, dropout, dtype,
        freeze_a, rank_pattern, alpha_pattern, loftq_iterations. Patterns match the end of a path.

    Returns:
      New params, with a `Kernel` in the place of each of these weights.

    Raises:
      UserError: `where` matches nothing, or weights whose axes are not known or that have an
        adapter of this name; a setting that cannot be used.
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
        stored, adapter = made(weight.path, weight.matrices, lora, spec, own, quantization)
        check_together(weight.path, on_with(weight.kernel.adapters, name, adapter))
        new[weight.path] = _with(
            weight, stored if lora.init in INITIALIZERS else None, name, adapter
        )
    return replaced(params, lambda path, leaf: new.get(path, leaf))


def _with(weight: ChosenWeight, stored: Any, name: str, adapter: Adapter) -> Kernel:
    """Returns a weight with one more adapter, and what is stored of it unless that stays."""
    kernel = weight.kernel
    adapter.keys = None  # `apply` is given the key
    value = kernel.value
    if stored is not None:
        axes, shape = kernel.known, kernel.shape
        value = stored if isinstance(stored, QTensor) else from_matrices(stored, axes, shape)
    return dataclasses.replace(kernel, value=value, adapters={**kernel.adapters, name: adapter})


def merge(params: Params) -> Any:
    """Returns params of plain arrays: 4-bit weights decoded, what adapters add to them added.

    Raises:
      UserError: there are no adapters and no weight in 4 bits.
    """
    check_merged(kernels_of(params))
    return replaced(params, lambda _, leaf: whole(leaf) if isinstance(leaf, Kernel) else leaf)
