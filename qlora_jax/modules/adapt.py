"""Modules whose weights are in 4 bits or adapted, used as before.

A module that owns such a weight gets a subclass of its class. The subclass carries out each of the
class's methods by `trace.run`: on a copy of the module that has arrays for these weights.
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
from qlora_jax.modules.known import axes_of
from qlora_jax.modules.trace import run
from qlora_jax.modules.uses import PATH, Use, recorded
from qlora_jax.modules.variables import QWeight
from qlora_jax.runtime.errors import UserError

ADAPTERS = "_adapters"
"""What is added to a kernel's name for the attribute that holds its adapters by name."""


class _AdaptedClass(type(nnx.Module)):  # type: ignore[misc]
    """The class of the subclasses, by which `pickle` finds them again."""


def is_adapted(module: Any) -> bool:
    """Returns whether a module has a subclass from here."""
    return isinstance(type(module), _AdaptedClass)


def adapt(module: nnx.Module) -> None:
    """Gives a module the subclass of its class, in place."""
    if not is_adapted(module):
        module.__class__ = adapted(type(module))


def restore(module: nnx.Module) -> None:
    """Gives a module its own class back, in place."""
    if is_adapted(module):
        module.__class__ = type(module).__mro__[1]


@functools.cache
def adapted(cls: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the subclass of a class of modules; it is made once."""
    own: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    for base in reversed(cls.__mro__):
        if base not in nnx.Module.__mro__:
            for name, method in vars(base).items():
                if callable(method) and _is_method(name, method):
                    own[name] = _traced(cls, name, getattr(cls, name))
    return _AdaptedClass(cls.__name__, (cls,), own)


def _reduced(cls: type) -> Any:
    """Returns how `pickle` makes the subclass again."""
    return adapted, (cls.__mro__[1],)


copyreg.pickle(_AdaptedClass, _reduced)


def _is_method(name: str, value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod | type) or not hasattr(value, "__get__"):
        return False
    own = inspect.unwrap(value)
    if inspect.isgeneratorfunction(own) or inspect.iscoroutinefunction(own):
        return False  # what it returns still runs when a trace would be over
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
    """Returns the variables that a module holds itself, by attribute."""
    return {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}


class _Stand(NamedTuple):
    """A parameter that stands for a kernel while a method runs.

    Attributes:
      attribute: the module's attribute that holds it.
      kernel: name of the kernel, the same for attributes that share a variable.
      kind: class of the variable.
      metadata: its metadata.
    """

    attribute: str
    kernel: str
    kind: type[nnx.Variable]
    metadata: tuple[tuple[str, Any], ...]


class _Method(NamedTuple):
    """What of a call is no array.

    Attributes:
      cls: the module's own class.
      name: name of the method.
      stands: what stands for the kernels.
      graph: structure of the module without its kernels, and of the arguments.
    """

    cls: type[nnx.Module]
    name: str
    stands: tuple[_Stand, ...]
    graph: nnx.GraphDef


def _called(
    cls: type[nnx.Module], name: str, module: nnx.Module, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Calls a method of a module, whose kernels stay what they are."""
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
    """Returns what the method returns, and what else it does."""

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
    """Returns the kernels that a module holds itself, and what stands for them in its methods."""
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

    While uses are recorded, each variable with a `PATH` is one.
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
