"""Puts 4-bit weights and adapters into any NNX model, in place."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.dropout import DropoutKeys
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.spec import check_patterns, spec_of
from qlora_jax.lora.variables import LoraParam
from qlora_jax.lora.where import Where
from qlora_jax.modules.adapt import ADAPTERS, adapt, adapters_of, is_adapted, kernel_of, restore
from qlora_jax.modules.adapters import (
    check_together,
    lora_settings,
    make_adapter,
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
"""Advice to the user in the error about an abstract weight."""


def quantize_model(
    model: Model, where: Where, *, embeddings: bool = False, **quantization: Any
) -> Model:
    """Quantizes weights of a model to 4 bits (QLoRA, section 3), in place.

    Args:
      model: NNX model of arrays. A weight is a parameter with two or more axes.
      where: weights to quantize: a regular expression that matches the whole path of a variable, a
        list of names that occur in paths, or a function (path, module) to bool.
      embeddings: True also quantizes tables whose rows are looked up, such as `nnx.Embed`'s.
      quantization: arguments of `quant.quantize`: codebook, block_size, double_quant,
        nested_block.

    Returns:
      The same model. Each quantized weight [*stack, *shape] is stored as matrices
      [*stack, *batch, K, N], with K the axes that its product sums over.

    Raises:
      UserError: `where` matches nothing; a weight has unknown axes (`register_kernel`, `discover`),
        is in 4 bits already, is abstract (`fill`) or is not finite; or an argument is not allowed.

    Example:
      ```python
      qj.quantize_model(model, r".*(attn|mlp).*kernel", codebook="nf4", double_quant=True)
      ```
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
    """Returns the weights that `quantize_model` quantizes.

    Raises:
      UserError: as `candidates`, or `where` matches only embeddings and `embeddings` is False.
    """
    found = [c for c in candidates(model, where) if embeddings or not c.table]
    check_not_tables_alone(found, where)
    return found


def put_quantized(candidate: Candidate, q: QTensor) -> None:
    """Replaces a weight by a QTensor, in each module that holds the weight."""
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
    """Adds adapters to weights of a model (LoRA, section 4.1), in place.

    The adapted weight is W + s·A·B; variant dora also trains the length of each of its columns.
    Until the adapters are trained, the model computes the same as before, except with init pissa
    and loftq. These two need weights in 16 bits: call add_lora with pissa before `quantize_model`;
    with loftq add_lora quantizes the weights itself.

    Args:
      model: NNX model; its weights may be in 4 bits.
      where: weights to adapt, as in `quantize_model`.
      rank: rank r of the adapters: A is [*stack, *batch, K, r] and B is [*stack, *batch, r, N] for
        a weight of matrices [*stack, *batch, K, N].
      alpha: numerator of the scale; by default s = alpha / r.
      rngs: source of the keys for A and for dropout (stream `params`).
      name: name of the adapter; a model can have several adapters with different names.
      quantization: arguments of `quant.quantize`, only for init loftq.
      settings: other settings of the section `lora`: variant, scaling, init, dropout, dtype,
        freeze_a, rank_pattern, alpha_pattern, loftq_iterations. Patterns match the end of a path.

    Returns:
      The same model.

    Raises:
      UserError: `where` matches nothing; a weight has unknown axes, is abstract or has an adapter
        of this name; or a setting is not allowed.

    Example:
      ```python
      qj.add_lora(model, ["query", "value"], rank=16, alpha=32, rngs=nnx.Rngs(1))
      ```
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
        stored, adapter = make_adapter(
            candidate.path, matrices_of(candidate), lora, spec, key, quantization
        )
        others = adapters_of(*candidate.owners[0])
        check_together(candidate.path, on_with(others, name, adapter))
        results.append((stored, adapter))
    for candidate, (stored, adapter) in zip(found, results):
        if lora.init in INITIALIZERS:
            if isinstance(stored, QTensor):
                put_quantized(candidate, stored)
            else:
                weight = from_matrices(stored, candidate.axes, candidate.own_shape)
                candidate.variable.set_raw_value(weight)
        attach(candidate, name, adapter)
    return model


def attach(candidate: Candidate, name: str, adapter: Adapter) -> None:
    """Adds an adapter to a weight, in each module that holds the weight."""
    for module, attribute in candidate.owners:
        if not adapters_of(module, attribute):
            setattr(module, attribute + ADAPTERS, nnx.data(nnx.Dict()))
        getattr(module, attribute + ADAPTERS)[name] = adapter
        adapt(module)


def use_adapter(model: Model, *names: str) -> Model:
    """Switches the named adapters on and all others off, in place.

    An adapter is off if its scale is 0. The scale is data, so switching compiles nothing.

    Args:
      model: NNX model with adapters.
      names: names of the adapters to switch on; without a name, all are off.

    Returns:
      The same model.

    Raises:
      UserError: the model has no adapter of a name, or a DoRA adapter would be on together with
        another adapter of the same weight.
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
    """Yields the path of the weight, the name and the adapter, for each adapter of a model."""
    seen = set()
    for path, module, attribute, _ in owned(model):
        for name, adapter in adapters_of(module, attribute).items():
            if id(adapter) not in seen:
                seen.add(id(adapter))
                yield path, name, adapter


def merge(model: Model) -> Model:
    """Returns a copy of a model with plain weights: decoded, and merged with the adapters.

    The given model does not change. Both models share the arrays that are equal, so donate neither
    of them to a compiled function.

    Args:
      model: NNX model with weights in 4 bits or adapters. Adapters that are off add nothing.

    Returns:
      A new model with the original classes, whose weights [*stack, *shape] have their original
      dtype.

    Raises:
      UserError: the model has no adapters and no weight in 4 bits.

    Example:
      ```python
      plain = qj.merge(model)
      ```
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
    """Splits a model into its structure, its trained state and its frozen state.

    Args:
      model: NNX model with adapters.
      names: names of the adapters to train; without a name, all adapters are trained.

    Returns:
      The structure; the trained variables of the adapters (`LoraParam`, such as A and B); and all
      other variables. `join` makes a model of these three.

    Raises:
      UserError: the model has no adapters, or no adapter of a name.

    Example:
      ```python
      graph, trained, frozen = qj.split(model)
      loss_fn = lambda trained, batch: loss(qj.join(graph, trained, frozen), batch)
      grads = jax.jit(jax.grad(loss_fn))(trained, batch)
      ```
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
    """Makes a model of the parts that `split` returns; also inside `jax.jit` and `jax.grad`.

    Args:
      graph: structure of the model.
      states: trained and frozen state, in any order.
      key: key of the adapters' dropout in this step. With None the model uses its own keys, which
        this function does not change, so each call drops the same elements.

    Returns:
      A new model.

    Example:
      ```python
      model = qj.join(graph, trained, frozen, key=jax.random.fold_in(key, step))
      ```
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
    """Returns a weight as matrices [*stack, *batch, K, N], an array or a QTensor."""
    value = candidate.variable.get_raw_value()
    return value if isinstance(value, QTensor) else to_matrices(value, candidate.axes)
