"""Changes NNX modules so that their methods work with weights in 4 bits and with adapters.

A module that holds such a weight gets a subclass of its class. The subclass runs each method of the
class by `trace.run`, on a copy of the module that has arrays in the place of these weights.
"""

import copyreg
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.lora.adapter import Adapter
from qlora_jax.modules.effects import Effects, before, do_again, effects, packed, unpacked
from qlora_jax.modules.kernel import Kernel, of_array
from qlora_jax.modules.kernel_rules import axes_of
from qlora_jax.modules.trace import run
from qlora_jax.modules.uses import PATH, Use, recorded
from qlora_jax.modules.variables import QWeight
from qlora_jax.runtime.errors import UserError

ADAPTERS = "_adapters"
"""Suffix of an attribute: `kernel` + ADAPTERS holds the adapters of `kernel` by name."""


class _AdaptedClass(type(nnx.Module)):  # type: ignore[misc]
    """Metaclass of the subclasses; `pickle` saves its classes by `_reduced`."""


def is_adapted(module: Any) -> bool:
    """Checks if a module has a subclass that `adapt` has set."""
    return isinstance(type(module), _AdaptedClass)


def adapt(module: nnx.Module) -> None:
    """Replaces a module's class by the subclass that `adapted` makes, in place."""
    if not is_adapted(module):
        module.__class__ = adapted(type(module))


def restore(module: nnx.Module) -> None:
    """Undoes `adapt`: gives a module its original class, in place."""
    if is_adapted(module):
        module.__class__ = type(module).__mro__[1]


@functools.cache
def adapted(cls: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the subclass of a class of modules; each class has one, made at the first call."""
    own: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    for base in reversed(cls.__mro__):
        if base not in nnx.Module.__mro__:
            for name, method in vars(base).items():
                if callable(method) and _is_method(name, method):
                    own[name] = _traced(cls, name, getattr(cls, name))
    return _AdaptedClass(cls.__name__, (cls,), own)


def _reduced(cls: type) -> Any:
    """Returns the function and arguments by which `pickle` makes the subclass again."""
    return adapted, (cls.__mro__[1],)


copyreg.pickle(_AdaptedClass, _reduced)


def _is_method(name: str, value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod | type) or not hasattr(value, "__get__"):
        return False
    own = inspect.unwrap(value)
    if inspect.isgeneratorfunction(own) or inspect.iscoroutinefunction(own):
        return False  # its body runs after the call, when the trace has ended
    return name == "__call__" or not name.startswith("__")


def _traced(cls: type[nnx.Module], name: str, method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return _called(cls, name, self, args, kwargs)

    return call


def adapters_of(module: nnx.Module, name: str) -> Mapping[str, Adapter]:
    """Returns the adapters of a module's kernel by their names."""
    return getattr(module, name + ADAPTERS, None) or {}


def variables_of(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns a module's variables by attribute, without those of its submodules."""
    return {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}


class _Stand(NamedTuple):
    """Description of the parameter that replaces a kernel while a method runs.

    Attributes:
      attribute: attribute of the module that holds the parameter.
      kernel: name of the kernel; attributes that share a variable have the same name.
      kind: class of the variable.
      metadata: metadata of the variable.
    """

    attribute: str
    kernel: str
    kind: type[nnx.Variable]
    metadata: tuple[tuple[str, Any], ...]


class _Method(NamedTuple):
    """The static part of a call: everything that is not an array.

    Attributes:
      cls: original class of the module.
      name: name of the method.
      stands: descriptions of the parameters that replace the kernels.
      graph: structure of the module without its kernels, and of the arguments.
    """

    cls: type[nnx.Module]
    name: str
    stands: tuple[_Stand, ...]
    graph: nnx.GraphDef


def _called(
    cls: type[nnx.Module], name: str, module: nnx.Module, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Calls a method of a module without making its kernels arrays."""
    kernels, stands = _kernels(module)
    hidden = {x for stand in stands for x in (stand.attribute, stand.attribute + ADAPTERS)}
    rest = object.__new__(cls)
    vars(rest).update({k: v for k, v in vars(module).items() if k not in hidden})
    graph, state = nnx.split((rest, args, kwargs))
    method = _Method(cls, name, stands, graph)
    uses = recorded()
    found: list[Use] = []
    if uses is None and not any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((kernels, state))
    ):
        out, done = _compiled(method, kernels, state)
    else:
        out, done = _performed(method, kernels, state, found)
    if uses is not None:
        uses += _by_path(found, module)
    objects = (module, args, kwargs)
    do_again(done, objects)
    return unpacked(out, objects)


def _performed(
    method: _Method, kernels: Mapping[str, Kernel], state: nnx.State, uses: list[Use]
) -> tuple[Any, Effects]:
    """Returns the packed result of a method, and its effects on module and arguments."""

    def function(arrays: Mapping[str, jax.Array], state: nnx.State) -> tuple[Any, Effects]:
        objects: Any = nnx.merge(method.graph, state)
        was = before(objects)
        module, args, kwargs = objects
        held = {name: _parameter(method.stands, name, x) for name, x in arrays.items()}
        vars(module).update({stand.attribute: held[stand.kernel] for stand in method.stands})
        out = getattr(method.cls, method.name)(module, *args, **kwargs)
        for stand in method.stands:
            if held[stand.kernel].get_raw_value() is not arrays[stand.kernel]:
                raise UserError(
                    f"{method.cls.__name__}.{method.name} writes to {stand.attribute}, which is "
                    "frozen; leave it out of `where`"
                )
            del vars(module)[stand.attribute]
        return packed(was, out), effects(was, objects)

    return run(function, kernels, (state,), uses)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(
    method: _Method, kernels: Mapping[str, Kernel], state: nnx.State
) -> tuple[Any, Effects]:
    return _performed(method, kernels, state, [])


def _parameter(stands: Sequence[_Stand], kernel: str, array: jax.Array) -> nnx.Variable:
    stand = next(stand for stand in stands if stand.kernel == kernel)
    return stand.kind.from_metadata(array, dict(stand.metadata))


def _kernels(module: nnx.Module) -> tuple[dict[str, Kernel], tuple[_Stand, ...]]:
    """Returns a module's own kernels, and the parameters that replace them in its methods."""
    kernels: dict[str, Kernel] = {}
    stands = []
    first: dict[int, str] = {}
    for name, variable in variables_of(module).items():
        kernel = kernel_of(module, name)
        if kernel is None:
            continue
        kind, metadata = type(variable), tuple(variable.get_metadata().items())
        if isinstance(variable, QWeight):
            kind, metadata = variable.stands_for.kind, variable.stands_for.metadata
        shared = first.setdefault(id(variable), name)
        kernels.setdefault(shared, kernel)
        stands.append(_Stand(name, shared, kind, metadata))
    return kernels, tuple(stands)


def kernel_of(module: nnx.Module, name: str) -> Kernel | None:
    """Returns a module's variable as a kernel; None if it is neither in 4 bits nor adapted.

    While uses are recorded, each variable with a `PATH` is a kernel, too.
    """
    variable, adapters = getattr(module, name), adapters_of(module, name)
    if isinstance(variable, QWeight):
        kernel = variable.kernel
    elif adapters or (recorded() is not None and variable.has_metadata(PATH)):
        kernel = of_array(variable.get_value(), axes_of(module, name, name))
    else:
        return None
    keys = {name: adapter.next_key() for name, adapter in adapters.items()}
    return dataclasses.replace(kernel, adapters=dict(adapters), keys=keys)


def _by_path(uses: Sequence[Use], module: nnx.Module) -> list[Use]:
    paths = {n: v.get_metadata(PATH, n) for n, v in variables_of(module).items()}
    return [use._replace(name=paths[use.name]) for use in uses]
