"""What of a model is in 4 bits, frozen and trained, in numbers."""

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
    """The variables of one kind.

    Attributes:
      variables: number of them.
      parameters: numbers that they stand for.
      bytes: bytes that they hold.
    """

    variables: int
    parameters: int
    bytes: int


class Summary(NamedTuple):
    """What a model holds; `str` makes a table of it.

    Attributes:
      quantized: weights in 4 bits.
      trained: A and B, and what else of the adapters is trained.
      frozen: all other parameters.
      other: what is no parameter, such as running averages and keys.
      adapters: name of an adapter to the number of weights that it is on.
      decoded: path of a 4-bit or adapted weight that a call needs as a whole array, to the
        operations that do; None where no example was given.
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
    """Counts what a model holds.

    Args:
      model: an NNX model, of arrays or of their shapes.
      args: example arguments of a call; with them the summary says which weights it decodes.
      method: the method that is called.
      kwargs: more arguments of the call.
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
    """Returns the summary of what any model holds.

    Args:
      values: the kind of each variable, one of "quantized", "trained", "frozen" and "other", and
        its arrays or QTensor.
      adapters: the name of each weight's each adapter.
      changed: paths of the weights that are in 4 bits or have adapters.
      uses: what a call does with each weight, by path; None if none is known.
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
    """Returns the kind of a model's or an adapter's variable, for `counted`."""
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
