"""Runs Linen modules whose params hold kernels, without decoding the weights for products.

An interceptor (`nn.intercept_methods`) gets each call of a module's method. If the module's own
params hold a `Kernel`, the method runs by `trace.run` on a copy of the module that has arrays in
place of the kernels. The copy is made by `flax.core.lift.pack`, as in `nn.remat`, so that the
method still writes to other collections, draws from the module's keys and calls its submodules.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen import transforms

from qlora_jax.modules.constants import arrays_of, packed, unpacked
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.trace import run
from qlora_jax.modules.uses import Use
from qlora_jax.runtime.errors import UserError

OTHER_AXIS = "a loop along another axis than its first (give it variable_axes={'params': 0})"
"""Recorded as the operation on a weight whose axis of layers is not the first."""


class CallRecord:
    """The uses of weights that one abstract call records.

    Two records are never equal, because `nn.jit` caches by the record.

    Attributes:
      uses: recorded uses, each with the path of its weight.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "adapters", "keys"],
    meta_fields=["axes", "shape", "dtype", "path", "record"],
)
@dataclasses.dataclass(frozen=True)
class Probe(Kernel):
    """A kernel whose uses are recorded.

    Attributes:
      path: path of the kernel in the params.
      record: record to which the uses are appended.
    """

    path: str
    record: CallRecord


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Same:
    """Placeholder in the results for the kernel of this name, which a method did not change."""

    name: str


def is_kernel(x: Any) -> bool:
    """Checks if x is a kernel; the `is_leaf` of trees of params."""
    return isinstance(x, Kernel)


def kernel_within(x: Any) -> Kernel | None:
    """Returns x if it is a kernel, or the kernel in a box of metadata such as `nn.Partitioned`."""
    leaves = jax.tree.leaves(x, is_leaf=is_kernel)
    return leaves[0] if len(leaves) == 1 and isinstance(leaves[0], Kernel) else None


def adapted() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which `module.apply` accepts params that hold kernels."""
    return nn.intercept_methods(_intercepted)


def _intercepted(next_method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Calls a method of a module; the interceptor for `nn.intercept_methods`."""
    module = context.module
    own = _own(module)
    if not own:
        return next_method(*args, **kwargs)
    if context.method_name == "setup":
        with _decoded(module.scope):
            return next_method(*args, **kwargs)
    method = context.orig_method.func

    def adapted_method(copy: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(copy, *args, **kwargs)

    where = f"{type(module).__name__}.{context.method_name}"
    lifted = _lifted(where, own)
    return transforms.lift_direct_transform(lifted, (adapted_method,), module, *args, **kwargs)


def _own(module: nn.Module) -> dict[str, Kernel]:
    """Returns the kernels in a module's own params, without those of its submodules, by name."""
    if module.scope is None:
        return {}
    params = module.variables.get("params", {})
    found = {name: kernel_within(x) for name, x in params.items() if not isinstance(x, Mapping)}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


@contextlib.contextmanager
def _decoded(scope: Any) -> Iterator[None]:
    """Decodes the kernels for a module's `setup`, because other code may read its attributes."""

    def get_variable(collection: str, name: str, default: Any = None) -> Any:
        value = type(scope).get_variable(scope, collection, name, default)
        whole = lambda x: x.whole() if isinstance(x, Kernel) else x  # noqa: E731
        return jax.tree.map(whole, value, is_leaf=is_kernel)

    scope.get_variable = get_variable
    try:
        yield
    finally:
        del scope.get_variable


def _lifted(where: str, own: Mapping[str, Kernel]) -> Callable:
    """Returns a lifted transformation (like `lift.checkpoint`) that runs a method by `trace.run`.

    Args:
      where: names of the module and its method, for errors.
      own: name to kernel; the scopes get arrays in place of these kernels.
    """
    names = {_identity(kernel): name for name, kernel in own.items()}

    def lifted(function: Callable, scopes: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(
            scope_of: Callable,
            repack: Callable,
            variables: Any,
            keys: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            leaves, structure = jax.tree.flatten(variables, is_leaf=is_kernel)
            found = [names.get(_identity(x)) if is_kernel(x) else None for x in leaves]
            places = {i: name for i, name in enumerate(found) if name is not None}
            given, put = arrays_of((args, kwargs))
            rest = [None if i in places else x for i, x in enumerate(leaves)]

            def body(held: Mapping[str, jax.Array], rest: Any, keys: Any, given: Any) -> Any:
                full = [held[places[i]] if i in places else x for i, x in enumerate(rest)]
                args, kwargs = put(given)
                scope = scope_of(jax.tree.unflatten(structure, full), keys)
                out = function(scope, *args, **kwargs)
                return packed(out), packed(_without(held, repack(scope), where))

            uses: list[Use] = []
            seen = {name: _seen(kernel) for name, kernel in own.items()}
            out, changed = unpacked(run(body, seen, (rest, keys, given), uses))
            _tell(uses, own)
            return out, jax.tree.map(
                lambda x: own[x.name] if isinstance(x, _Same) else x,
                changed,
                is_leaf=lambda x: isinstance(x, _Same),
            )

        whole = lift.pack(inner, (True,), (True,), (True,), enable_kwargs=True)
        return whole(scopes, *args, **kwargs)

    return lifted


def _identity(kernel: Kernel) -> Any:
    """Returns a key that is equal for a kernel and a copy with the same arrays."""
    return kernel.axes, tuple(id(x) for x in jax.tree.leaves(kernel))


def _without(held: Mapping[str, jax.Array], written: Any, where: str) -> Any:
    """Returns the variables that a method writes, with a `_Same` in place of each weight.

    Raises:
      UserError: the method writes other values to a weight.
    """
    names = {id(array): name for name, array in held.items()}
    leaves, structure = jax.tree.flatten(written)
    marked = [_Same(names[id(x)]) if id(x) in names else x for x in leaves]
    params = any("params" in group for groups in written for group in groups)
    if params and (lost := held.keys() - {x.name for x in marked if isinstance(x, _Same)}):
        raise UserError(
            f"{where} writes to {sorted(lost)[0]}, which is frozen; leave it out of `where`"
        )
    return jax.tree.unflatten(structure, marked)


def _tell(uses: list[Use], own: Mapping[str, Kernel]) -> None:
    """Appends the uses of probes to their records."""
    for use in uses:
        if isinstance(probe := own[use.name], Probe):
            if probe.axes is None and not _is_layer(probe):
                use = Use(use.name, "decoded", OTHER_AXIS)
            probe.record.uses.append(use._replace(name=probe.path))


def _is_layer(probe: Probe) -> bool:
    """Checks if loops around the module have removed only leading axes of the weight."""
    shape = tuple(probe.value.shape)
    return probe.shape[len(probe.shape) - len(shape) :] == shape


def _seen(kernel: Kernel) -> Kernel:
    """Returns a kernel; if its axes are unknown, `shape` is the shape of its current value."""
    if kernel.axes is not None:
        return kernel
    return dataclasses.replace(kernel, shape=tuple(kernel.value.shape))
