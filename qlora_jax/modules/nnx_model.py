"""4-bit weights and adapters in any NNX model, in place."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.dropout import DropoutKeys
from qlora_jax.lora.spec import check_patterns, spec_of
from qlora_jax.lora.variables import LoraParam
from qlora_jax.lora.where import Where
from qlora_jax.modules.adapt import ADAPTERS, adapt, adapters_of, is_adapted, kernel_of, restore
from qlora_jax.modules.adapters import (
    check_together,
    lora_settings,
    made,
    names_of,
    on_with,
    strength,
)
from qlora_jax.modules.axes import from_matrices, to_matrices
from qlora_jax.modules.candidates import Candidate, candidates, check_model, owned
from qlora_jax.modules.checks import (
    check_adapter,
    check_floats,
    check_merged,
    check_names,
    check_not_tables_alone,
    check_trained,
    check_values,
)
from qlora_jax.modules.kernel import whole
from qlora_jax.modules.quantizing import quantized
from qlora_jax.modules.variables import QWeight, in_place_of, restored
from qlora_jax.quant import QTensor

Model = TypeVar("Model", bound=nnx.Module)

READ = "qlora_jax.fill(model, source, ...) reads them one by one"
"""What to do with weights that are abstract."""


def quantize_model(
    model: Model, where: Where, *, embeddings: bool = False, **quantization: Any
) -> Model:
    """Stores weights of a model in 4 bits (QLoRA, section 3), in place.

    Args:
      model: an NNX model.
      where: which weights, by the paths of their variables (`lora.where.Where`).
      embeddings: whether tables that are looked up, such as `nnx.Embed`'s, are quantized, too.
      quantization: arguments of `quant.quantize`: codebook, block_size, double_quant,
        nested_block.

    Returns:
      The model.

    Raises:
      UserError: `where` matches nothing, or weights whose axes are not known, that are in 4 bits
        already, abstract, or not finite; an argument that cannot be used.
    """
    found = to_quantize(check_model(model), where, embeddings)
    values = [c.variable.get_raw_value() for c in found]
    for candidate, value in zip(found, values):
        check_values(candidate.path, value, READ)
        check_floats(candidate.path, value)
    stored = [(c, quantized(w, c.axes, c.path, **quantization)) for c, w in zip(found, values)]
    for candidate, q in stored:
        put_quantized(candidate, q)
    return model


def to_quantize(model: nnx.Module, where: Where, embeddings: bool) -> list[Candidate]:
    """Returns the weights that `quantize_model` stores in 4 bits.

    Raises:
      UserError: as `candidates`, or `where` matches embeddings alone and they are not asked for.
    """
    found = [c for c in candidates(model, where) if embeddings or not c.table]
    check_not_tables_alone(found, where)
    return found


def put_quantized(candidate: Candidate, q: QTensor) -> None:
    """Puts a QTensor in the place of a weight, in each module that holds it."""
    variable = in_place_of(candidate.variable, q, candidate.axes, candidate.table)
    for module, name in candidate.owners:
        setattr(module, name, variable)
        adapt(module)


def add_lora(
    model: Model,
    where: Where,
    rank: int = 16,
    alpha: float = 32.0,
    *,
    rngs: nnx.Rngs,
    name: str = "default",
    quantization: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Model:
    """Puts adapters on weights of a model (LoRA, section 4.1), in place.

    The model computes the same as before until the adapters are trained, unless `init` is pissa or
    loftq. Those go on weights in 16 bits: pissa before `quantize_model`, loftq in its place.

    Args:
      model: an NNX model; its weights may be in 4 bits.
      where: which weights, by the paths of their variables (`lora.where.Where`).
      rank: r.
      alpha: numerator of the scale.
      rngs: where the keys for A and for dropout come from (`params`).
      name: name of the adapter; a model can have several.
      quantization: arguments of `quant.quantize` for init loftq.
      settings: other settings of the section `lora`: variant, scaling, init, dropout, dtype,
        freeze_a, rank_pattern, alpha_pattern, loftq_iterations. Patterns match the end of a path.

    Returns:
      The model.

    Raises:
      UserError: `where` matches nothing, or weights whose axes are not known or that have an
        adapter of this name; a setting that cannot be used.
    """
    found = candidates(check_model(model), where)
    lora = lora_settings(rank=rank, alpha=alpha, **settings)
    for candidate in found:
        path, value = candidate.path, candidate.variable.get_raw_value()
        names = adapters_of(*candidate.owners[0])
        check_adapter(path, value, candidate.table, lora, name, names)
        check_values(path, value, READ)
    check_patterns(lora, [name for c in found for name in names_of(c.path)])
    results: list[tuple[Any, Adapter]] = []
    for candidate in found:
        spec = spec_of(lora, *names_of(candidate.path))
        key = rngs.params()
        stored, adapter = made(
            candidate.path, matrices_of(candidate), lora, spec, key, quantization
        )
        others = adapters_of(*candidate.owners[0])
        check_together(candidate.path, on_with(others, name, adapter))
        results.append((stored, adapter))
    for candidate, (stored, adapter) in zip(found, results):
        if lora.init == "loftq":
            put_quantized(candidate, stored)
        elif lora.init == "pissa":
            weight = from_matrices(stored, candidate.axes, candidate.own_shape)
            candidate.variable.set_raw_value(weight)
        attach(candidate, name, adapter)
    return model


def attach(candidate: Candidate, name: str, adapter: Adapter) -> None:
    """Puts an adapter on a weight, in each module that holds it."""
    for module, attribute in candidate.owners:
        if not adapters_of(module, attribute):
            setattr(module, attribute + ADAPTERS, nnx.data(nnx.Dict()))
        getattr(module, attribute + ADAPTERS)[name] = adapter
        adapt(module)


def use_adapter(model: Model, *names: str) -> Model:
    """Switches the named adapters on and all others off, in place; no name leaves the base alone.

    Which are on is data (their scale): a compiled program serves any choice.

    Raises:
      UserError: an adapter that the model does not have, or a DoRA adapter beside another one.
    """
    adapters = list(all_adapters(check_model(model)))
    check_names(names, {name for _, name, _ in adapters})
    for path, module, attribute, _ in owned(model):
        own = adapters_of(module, attribute)
        check_together(path, {name: own[name] for name in names if name in own})
    for _, name, adapter in adapters:
        strength(adapter, name in names)
    return model


def all_adapters(model: nnx.Module) -> Iterator[tuple[str, str, Adapter]]:
    """Yields the weight's path, the name and the adapter of each adapter of a model."""
    seen = set()
    for path, module, attribute, _ in owned(model):
        for name, adapter in adapters_of(module, attribute).items():
            if id(adapter) not in seen:
                seen.add(id(adapter))
                yield path, name, adapter


def merge(model: Model) -> Model:
    """Returns a model of plain arrays: 4-bit weights decoded, what adapters add to them added.

    The model that is given stays as it is; arrays that do not change are shared with it, so do not
    donate them.

    Raises:
      UserError: the model has no adapters and no weight in 4 bits.
    """
    graph, state = nnx.split(check_model(model))
    plain: Any = nnx.merge(graph, state, copy=True)
    merged: dict[int, nnx.Variable] = {}
    for _, module, name, variable in list(owned(plain)):
        if id(variable) not in merged and (kernel := kernel_of(module, name)):
            merged[id(variable)] = _merged(variable, whole(kernel))
        if id(variable) in merged:
            setattr(module, name, merged[id(variable)])
            if hasattr(module, name + ADAPTERS):
                delattr(module, name + ADAPTERS)
    check_merged(merged)
    for _, module in nnx.iter_modules(plain):
        if is_adapted(module):
            restore(module)
    return plain


def _merged(variable: nnx.Variable, value: jax.Array) -> nnx.Variable:
    if isinstance(variable, QWeight):
        return restored(variable.stands_for, value)
    return variable.copy(value)


def split(model: nnx.Module, *names: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Takes a model apart into its structure, what is trained and what is frozen.

    Args:
      model: an NNX model with adapters.
      names: names of the adapters that are trained; none given is all.

    Returns:
      The structure; A and B (`LoraParam`); and everything else. `join` puts them together.

    Raises:
      UserError: an adapter that the model does not have; a model without adapters.
    """
    adapters = list(all_adapters(check_model(model)))
    check_trained(names, {own for _, own, _ in adapters})
    chosen = {
        id(v)
        for _, own, adapter in adapters
        if own in names or not names
        for v in vars(adapter).values()
        if isinstance(v, LoraParam)
    }
    graph, *states = nnx.split(model, lambda path, x: id(x) in chosen, ...)
    return graph, states[0], states[1]


def join(graph: nnx.GraphDef, *states: Any, key: jax.Array | None = None) -> Any:
    """Puts together what `split` took apart, inside `jax.jit` and `jax.grad` as well.

    Args:
      graph: structure of the model.
      states: what is trained and what is frozen, in any order.
      key: key of this step's dropout; without it a model's dropout is that of its own keys, which
        are the same in each call since this function does not change them.

    Returns:
      A new model.
    """
    model = nnx.merge(graph, *states, copy=True)
    if key is not None:
        for i, (_, _, adapter) in enumerate(all_adapters(model)):
            if (keys := adapter.keys) is not None:
                again = DropoutKeys(jax.random.fold_in(key, i), keys.count.get_value().shape)
                again.deterministic = keys.deterministic
                adapter.keys = nnx.data(again)
    return model


def matrices_of(candidate: Candidate) -> Any:
    """Returns a weight's matrices [*stack, *batch, K, N], an array or a QTensor."""
    value = candidate.variable.get_raw_value()
    return value if isinstance(value, QTensor) else to_matrices(value, candidate.axes)
