"""Finds the params of a Linen module that can be quantized or adapted, and their axes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.core import DenyList, meta

from qlora_jax.lora.where import Where, chosen
from qlora_jax.modules.axes import (
    TABLE,
    Axes,
    all_matrices_shape,
    checked,
    from_equation,
    to_matrices,
)
from qlora_jax.modules.checks import warn_left_out
from qlora_jax.modules.constants import arrays_of
from qlora_jax.modules.kernel import Kernel, of_array
from qlora_jax.modules.linen.intercept import CallRecord, Probe, adapted, kernel_within
from qlora_jax.modules.linen.params import Params, check_module, leaves_of, replaced
from qlora_jax.modules.uses import Use
from qlora_jax.modules.variables import KnownVariable
from qlora_jax.quant import QTensor
from qlora_jax.runtime.errors import UserError

Given = Mapping[str, KnownVariable | Axes | str]
"""Path of a weight to its axes: the result of `discover`, `Axes`, or an einsum."""

BY_AXES = "by axes={path: '...k,kn->...n'}"
"""How a user gives axes; part of error messages."""

ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


class ChosenWeight(NamedTuple):
    """A weight that `where` matches.

    Attributes:
      path: path of the weight, such as layers.attn.query.kernel.
      kernel: unchanged weight.
      table: True for a table whose rows are looked up.
    """

    path: str
    kernel: Kernel
    table: bool

    @property
    def matrices(self) -> Any:
        """Returns the weight's matrices [*stack, *batch, K, N], an array or a QTensor."""
        value = self.kernel.value
        return value if isinstance(value, QTensor) else to_matrices(value, self.kernel.known)

    @property
    def matrices_shape(self) -> tuple[int, ...]:
        """Returns the shape of `matrices`."""
        kernel = self.kernel
        return all_matrices_shape(kernel.known, (*kernel.stack, *kernel.shape))


def uses_of(
    module: nn.Module,
    params: Params,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Any = None,
    variables: Mapping[str, Any] = {},
) -> dict[str, list[Use]]:
    """Returns path to uses of each weight in one abstract call; [] if the call does not read it.

    A weight is a kernel, or an array with two or more axes. The call needs no other collections,
    and no keys for the streams `params` and `dropout`, because it is abstract.
    """
    record = CallRecord()
    found: dict[str, list[Use]] = {}

    def probe(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Kernel):
            if len(getattr(leaf, "shape", ())) < 2:
                return leaf
            leaf = of_array(leaf, None)
        found[path] = []
        fields = (leaf.value, leaf.adapters, leaf.keys, leaf.axes, leaf.shape, leaf.dtype)
        return Probe(*fields, path, record)

    probes = replaced(params, probe)
    given, put = arrays_of((args, dict(kwargs), dict(variables)), ARRAYS)

    def call(probes: Any, given: Any) -> None:
        args, kwargs, variables = put(given)
        kwargs.setdefault("mutable", DenyList("params"))
        key = jax.random.key(0)
        kwargs["rngs"] = {"params": key, "dropout": key, **(kwargs.get("rngs") or {})}
        with adapted():
            module.apply({**variables, "params": probes}, *args, method=method, **kwargs)

    jax.eval_shape(call, probes, given)
    for use in dict.fromkeys(record.uses):
        found[use.name].append(use)
    return found


def found_in(uses: list[Use]) -> KnownVariable:
    """Returns the axes of a weight that its uses show, and whether it is a table."""
    if any(use.kind == "rows" for use in uses):
        # a weight that is looked up and also multiplied is stored as a table
        return KnownVariable(TABLE, True)
    return KnownVariable(next((use.axes for use in uses if use.axes is not None), None), False)


def weights(
    module: nn.Module, params: Params, where: Where, example: tuple[Any, ...], axes: Given
) -> list[ChosenWeight]:
    """Returns the weights that `where` matches; warns if no product and no look-up uses a weight.

    Args:
      module: Linen module.
      params: params of the module.
      where: weights to return: a regular expression, a list of names, or a function of path and
        array or `Kernel`.
      example: arguments of one abstract call that shows the axes; () makes no call.
      axes: path of a weight to its axes, for weights whose axes the call does not have to show.

    Raises:
      UserError: `where` or one of its names matches nothing, or only weights that no product and no
        look-up uses; or the axes of a weight are not known, or are no matrix product.
    """
    leaves = _weights_of(params)
    known = {path: _read(path, axes[path], leaves) for path in axes}
    uses = uses_of(check_module(module), params, example, {}) if example else {}
    known |= {path: found_in(own) for path, own in uses.items() if path not in known}
    kernels = {path: x.known for path, x in leaves.items() if isinstance(x, Kernel)}
    known |= {path: KnownVariable(own, own == TABLE) for path, own in kernels.items()}
    matched = chosen(where, leaves, "weights")
    for path in matched.keys() - known.keys():
        raise UserError(
            f"{path}: it is not known which axes of {matched[path].shape} are summed over; give "
            f"example arguments of a call after `where`, or give the axes {BY_AXES}"
        )
    parts = [where] if callable(where) or isinstance(where, str) else [[name] for name in where]
    for part in parts:
        own = list(chosen(part, matched, "weights"))
        if all(known[path].axes is None for path in own):
            how = ", ".join(use.operation for use in uses.get(own[0], [])) or "nothing"
            raise UserError(
                f"{own[0]}: no matrix product of the call has it, only: {how}; leave it out of "
                f"`where`, or give the axes {BY_AXES}"
            )
    warn_left_out([path for path in matched if known[path].axes is None])
    return [_weight(path, x, known[path]) for path, x in matched.items() if known[path].axes]


def _weight(path: str, leaf: Any, found: KnownVariable) -> ChosenWeight:
    if isinstance(leaf, Kernel):
        return ChosenWeight(path, leaf, found.table)
    assert found.axes is not None
    axes = checked(found.axes, path, len(leaf.shape), BY_AXES)
    return ChosenWeight(path, of_array(leaf, axes), found.table)


def _weights_of(params: Params) -> dict[str, Any]:
    """Returns the kernels, and the arrays with two or more axes, by path."""
    found = {}
    for path, leaf in leaves_of(params).items():
        x = kernel_within(leaf) or meta.unbox(leaf)
        if isinstance(x, Kernel) or len(getattr(x, "shape", ())) > 1:
            found[path] = x
    return found


def _read(path: str, axes: KnownVariable | Axes | str, leaves: Mapping[str, Any]) -> KnownVariable:
    if path not in leaves:
        raise UserError(f"axes: {path!r} is none of the weights; there are {', '.join(leaves)}")
    if isinstance(axes, KnownVariable):
        return axes
    if isinstance(axes, str):
        axes = from_equation(axes, path, BY_AXES)
    return KnownVariable(Axes(*axes), False)
