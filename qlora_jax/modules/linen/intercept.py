"""Linen modules whose params hold kernels, carried out without the weights as arrays.

An interceptor (`nn.intercept_methods`) gets each call of a module's method. If the module's own
params hold a `Kernel`, the method runs by `trace.run` on a copy of the module that has arrays for
these. The copy is made as `nn.remat` makes one (`flax.core.lift.pack`), so what the method writes
to other collections, draws from the module's keys and does with its submodules is as before.
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
"""What is told of a weight whose layers are not in front."""


class CallRecord:
    """What an abstract call has told of weights; no two are equal, as `nn.jit` caches by them.

    Attributes:
      uses: by the weights' paths.
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
    """A kernel whose uses are told.

    Attributes:
      path: its path in the params.
      record: where they are told.
    """

    path: str
    record: CallRecord


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Same:
    """Stands among results for a kernel of this name that a method has left as it is."""

    name: str


def is_kernel(x: Any) -> bool:
    """Returns whether x is a kernel: where to stop in a tree of params."""
    return isinstance(x, Kernel)


def within(x: Any) -> Kernel | None:
    """Returns the kernel that x is, or that a box of metadata such as `nn.Partitioned` holds."""
    leaves = jax.tree.leaves(x, is_leaf=is_kernel)
    return leaves[0] if len(leaves) == 1 and isinstance(leaves[0], Kernel) else None


def adapted() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which modules can be applied to params that hold kernels."""
    return nn.intercept_methods(_intercepted)


def _intercepted(next_method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Calls a method of a module, as `nn.intercept_methods` asks for."""
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
    """Returns the kernels that a module's own params hold, not its submodules', by name."""
    if module.scope is None:
        return {}
    params = module.variables.get("params", {})
    found = {name: within(x) for name, x in params.items() if not isinstance(x, Mapping)}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


@contextlib.contextmanager
def _decoded(scope: Any) -> Iterator[None]:
    """Gives a module's `setup` its kernels as arrays: as attributes others may read them."""

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
    """Returns a transformation of functions of scopes, such as `lift.checkpoint` is one.

    Args:
      where: the module and its method, for errors.
      own: the kernels for which the scopes get arrays.
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
    """Returns what is the same for a kernel and for a copy with the same arrays."""
    return kernel.axes, tuple(id(x) for x in jax.tree.leaves(kernel))


def _without(held: Mapping[str, jax.Array], written: Any, where: str) -> Any:
    """Returns what a method writes with a mark in the place of each weight.

    Raises:
      UserError: it writes other values to a weight.
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
    """Tells the uses of probes where they are collected."""
    for use in uses:
        if isinstance(probe := own[use.name], Probe):
            if probe.axes is None and not _is_layer(probe):
                use = Use(use.name, "decoded", OTHER_AXIS)
            probe.record.uses.append(use._replace(name=probe.path))


def _is_layer(probe: Probe) -> bool:
    """Returns whether it has lost no axes but its first to loops around the module."""
    shape = tuple(probe.value.shape)
    return probe.shape[len(probe.shape) - len(shape) :] == shape


def _seen(kernel: Kernel) -> Kernel:
    """Returns a kernel of unknown axes with the shape that it has where it is used."""
    if kernel.axes is not None:
        return kernel
    return dataclasses.replace(kernel, shape=tuple(kernel.value.shape))
