"""What a method does to the objects that it is given, beside its result, told outside of a trace.

A method that is traced gets copies of its module and arguments. What it changes in them is found by
their paths, and done again to the originals.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.modules import constants
from qlora_jax.modules.constants import Constant


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Reference:
    """A result that is one of the objects that were given.

    Attributes:
      path: path of the object.
    """

    path: tuple[Any, ...]


class Attributes(NamedTuple):
    """How the attributes of an object have changed that hold no arrays.

    Attributes:
      path: path of the object.
      values: names and new values.
      deleted: names of those that are gone, of any kind.
    """

    path: tuple[Any, ...]
    values: tuple[tuple[str, Any], ...]
    deleted: tuple[str, ...]


class Effects(NamedTuple):
    """What a method has done to its objects.

    Attributes:
      variables: those that it has changed or added.
      attributes: a `Constant` of a tuple of `Attributes`.
    """

    variables: nnx.State
    attributes: Constant


class Before(NamedTuple):
    """What objects hold before a method is called.

    Attributes:
      arrays: path of a variable to its arrays.
      attributes: path of an object to its attributes.
      paths: id of an object to its path.
    """

    arrays: dict[tuple[Any, ...], list[Any]]
    attributes: dict[tuple[Any, ...], dict[str, Any]]
    paths: dict[int, tuple[Any, ...]]


def before(objects: Any) -> Before:
    """Returns what a pytree of modules and arguments holds now."""
    found = dict(_objects(objects))
    attributes = {path: _attributes(x) for path, x in found.items()}
    return Before(_arrays(nnx.state(objects)), attributes, {id(x): p for p, x in found.items()})


def effects(was: Before, objects: Any) -> Effects:
    """Returns what has been done to objects since."""
    state = nnx.state(objects)
    now = _arrays(state)
    changed = {path for path in now if not _same(was.arrays.get(path), now[path])}
    variables = nnx.from_flat_state([(p, x) for p, x in nnx.to_flat_state(state) if p in changed])
    known = ((path, x) for path, x in _objects(objects) if path in was.attributes)
    attributes = (_compared(path, was.attributes[path], _attributes(x)) for path, x in known)
    return Effects(variables, Constant(tuple(x for x in attributes if x.values or x.deleted)))


def do_again(done: Effects, objects: Any) -> None:
    """Does to other objects of the same structure what has been done to their copies."""
    if done.attributes.value:
        by_path = dict(_objects(objects))
        for path, values, deleted in done.attributes.value:
            for name in deleted:
                delattr(by_path[path], name)
            for name, value in values:
                setattr(by_path[path], name, value)
    if done.variables:
        nnx.update(objects, done.variables)


def packed(was: Before, out: Any) -> Any:
    """Returns a result as arrays and constants."""

    def pack(x: Any) -> Any:
        return Reference(was.paths[id(x)]) if id(x) in was.paths else x

    return constants.packed(jax.tree.map(pack, out, is_leaf=lambda x: id(x) in was.paths))


def unpacked(out: Any, objects: Any) -> Any:
    """Returns a result that has been packed, its references being to `objects`."""

    def unpack(x: Any) -> Any:
        return dict(_objects(objects))[x.path] if isinstance(x, Reference) else x

    out = constants.unpacked(out)
    return jax.tree.map(unpack, out, is_leaf=lambda x: isinstance(x, Reference))


def _objects(objects: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, x in nnx.iter_graph(objects):
        if isinstance(x, nnx.Pytree):
            yield path, x


def _attributes(x: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(x).items() if not k.startswith("_pytree__")}


def _compared(path: tuple[Any, ...], was: dict[str, Any], now: dict[str, Any]) -> Attributes:
    new = ((k, v) for k, v in now.items() if k not in was or was[k] is not v)
    values = tuple((k, v) for k, v in new if not _is_data(v))
    return Attributes(path, values, tuple(k for k in was if k not in now))


def _is_data(x: Any) -> bool:
    """Returns whether a value is an array or holds some."""
    if isinstance(x, nnx.Variable | nnx.Pytree):
        return True
    return any(isinstance(leaf, jax.Array | nnx.Pytree) for leaf in jax.tree.leaves(x))


def _arrays(state: nnx.State) -> dict[tuple[Any, ...], list[Any]]:
    return {path: jax.tree.leaves(x) for path, x in nnx.to_flat_state(state)}


def _same(was: list[Any] | None, now: list[Any]) -> bool:
    return was is not None and len(was) == len(now) and all(x is y for x, y in zip(was, now))
