"""Counts the 4-bit, frozen and trained parameters and bytes of a model."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.lora.variables import LoraConstant, LoraParam
from qlora_jax.modules.adapt import adapters_of
from qlora_jax.modules.candidates import check_model, owned
from qlora_jax.modules.discover import uses_of
from qlora_jax.modules.nnx_model import all_adapters
from qlora_jax.modules.uses import Use
from qlora_jax.modules.variables import QWeight
from qlora_jax.quant import QTensor, nbytes


class KindSummary(NamedTuple):
    """Counts of the variables of one kind.

    Attributes:
      variables: number of variables.
      parameters: number of parameters; a weight in 4 bits counts with its original shape.
      bytes: stored bytes.
    """

    variables: int
    parameters: int
    bytes: int


class Summary(NamedTuple):
    """Counts of a model's variables; `str` returns a table.

    Attributes:
      quantized: weights in 4 bits.
      trained: A, B and other trained variables of the adapters.
      frozen: all other parameters.
      other: variables that are no parameters, such as running averages and keys.
      adapters: name of an adapter to the number of its weights.
      decoded: path of a 4-bit or adapted weight to the operations that need the weight as a whole
        array; None if `summary` got no example.
    """

    quantized: KindSummary
    trained: KindSummary
    frozen: KindSummary
    other: KindSummary
    adapters: dict[str, int]
    decoded: dict[str, tuple[str, ...]] | None

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def summary(model: nnx.Module, *args: Any, method: str = "__call__", **kwargs: Any) -> Summary:
    """Counts parameters and bytes of a model: quantized, trained and frozen.

    Args:
      model: NNX model of arrays or of shapes.
      args: example arguments of a call, arrays or shapes; with them the summary also lists the
        weights that this call decodes as a whole.
      method: name of the method to call.
      kwargs: keyword arguments of the call.

    Returns:
      The counts; `print` shows them as a table.

    Raises:
      UserError: the model is no NNX module.

    Example:
      ```python
      print(qj.summary(model, tokens))
      ```
    """
    check_model(model)
    parts = [(kind_of(x), x.get_raw_value()) for x in _variables(model)]
    adapters = [name for _, name, _ in all_adapters(model)]
    changed = {
        path
        for path, module, name, variable in owned(model)
        if isinstance(variable, QWeight) or adapters_of(module, name)
    }
    uses = uses_of(model, args, kwargs, method) if args or kwargs else None
    return counted(parts, adapters, changed, uses)


def counted(
    values: Iterable[tuple[str, Any]],
    adapters: Iterable[str],
    changed: Collection[str],
    uses: Mapping[str, Sequence[Use]] | None,
) -> Summary:
    """Builds the summary of an NNX or Linen model.

    Args:
      values: for each variable its kind ("quantized", "trained", "frozen" or "other") and its
        arrays or QTensor.
      adapters: name of each adapter of each weight.
      changed: paths of the weights that are in 4 bits or have adapters.
      uses: path of a weight to its uses in an example call; None without an example.
    """
    kinds: dict[str, list[Any]] = {"quantized": [], "trained": [], "frozen": [], "other": []}
    for kind, value in values:
        kinds[kind].append(value)
    decoded = None
    if uses is not None:
        whole = {
            path: tuple(use.operation for use in uses[path] if use.kind == "decoded")
            for path in uses
            if path in changed
        }
        decoded = {path: operations for path, operations in whole.items() if operations}
    parts = {kind: _part(own) for kind, own in kinds.items()}
    return Summary(**parts, adapters=dict(Counter(adapters)), decoded=decoded)


def _variables(model: nnx.Module) -> Iterator[nnx.Variable]:
    """Yields each variable of a model once."""
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
    yield from (x for x in leaves if isinstance(x, nnx.Variable))


def kind_of(variable: nnx.Variable) -> str:
    """Returns the kind of a variable, for `counted`: quantized, trained, frozen or other."""
    if isinstance(variable, QWeight):
        return "quantized"
    if isinstance(variable, LoraParam):
        return "trained"
    return "frozen" if isinstance(variable, nnx.Param | LoraConstant) else "other"


def _part(values: Sequence[Any]) -> KindSummary:
    parameters = 0
    for value in values:
        shapes = [value] if isinstance(value, QTensor) else jax.tree.leaves(value)
        parameters += sum(math.prod(x.shape) for x in shapes)
    return KindSummary(len(values), parameters, nbytes(list(values)))


def _lines(found: Summary) -> Iterator[str]:
    parts = {"quantized": found.quantized, "frozen": found.frozen, "trained": found.trained}
    if found.other.variables:
        parts["other"] = found.other
    total = KindSummary(*(sum(column) for column in zip(*parts.values())))
    yield f"{'':<10}{'variables':>10}{'parameters':>16}{'bytes':>16}"
    for name, part in {**parts, "total": total}.items():
        line = f"{name:<10}{part.variables:>10,}{part.parameters:>16,}{part.bytes:>16,}"
        if name == "quantized" and part.parameters:
            line += f"  {8 * part.bytes / part.parameters:.3f} bits a parameter"
        if name == "trained" and found.adapters:
            line += "  " + ", ".join(f"{k} on {n} weights" for k, n in found.adapters.items())
        yield line
    if found.decoded is None:
        yield "give example inputs to see which weights a call decodes"
    elif not found.decoded:
        yield "no weight is decoded outside of its product"
    else:
        yield "decoded as a whole, by the operations in brackets:"
        for path, operations in found.decoded.items():
            yield f"  {path} ({', '.join(operations)})"
