"""Repeats the side effects of a traced method on the original module and arguments.

A traced method gets copies of its module and arguments. The changes to the copies are found by path
and then made to the originals.
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
    """A result that is one of the method's own input objects.

    Attributes:
      path: path of the object.
    """

    path: tuple[Any, ...]


class Attributes(NamedTuple):
    """Changes to the attributes of one object; new values are only those without arrays.

    Attributes:
      path: path of the object.
      values: names and new values of changed attributes that hold no arrays.
      deleted: names of deleted attributes of any kind.
    """

    path: tuple[Any, ...]
    values: tuple[tuple[str, Any], ...]
    deleted: tuple[str, ...]


class Effects(NamedTuple):
    """All changes that a method has made to its objects.

    Attributes:
      variables: changed or added variables.
      attributes: `Constant` with a tuple of `Attributes`.
    """

    variables: nnx.State
    attributes: Constant


class Before(NamedTuple):
    """Snapshot of objects before a method is called.

    Attributes:
      arrays: path of a variable to its arrays.
      attributes: path of an object to its attributes.
      paths: id of an object to its path.
    """

    arrays: dict[tuple[Any, ...], list[Any]]
    attributes: dict[tuple[Any, ...], dict[str, Any]]
    paths: dict[int, tuple[Any, ...]]


def before(objects: Any) -> Before:
    """Returns a snapshot of a pytree of modules and arguments."""
    found = dict(_objects(objects))
    attributes = {path: _attributes(x) for path, x in found.items()}
    return Before(_arrays(nnx.state(objects)), attributes, {id(x): p for p, x in found.items()})


def effects(was: Before, objects: Any) -> Effects:
    """Returns the changes to objects since the snapshot `was`."""
    state = nnx.state(objects)
    now = _arrays(state)
    changed = {path for path in now if not _same(was.arrays.get(path), now[path])}
    variables = nnx.from_flat_state([(p, x) for p, x in nnx.to_flat_state(state) if p in changed])
    known = ((path, x) for path, x in _objects(objects) if path in was.attributes)
    attributes = (_compared(path, was.attributes[path], _attributes(x)) for path, x in known)
    return Effects(variables, Constant(tuple(x for x in attributes if x.values or x.deleted)))


def do_again(done: Effects, objects: Any) -> None:
    """Makes the changes `done`, found on copies, to the original objects, in place."""
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
    """Returns a result with only arrays as leaves; input objects become `Reference`s."""

    def pack(x: Any) -> Any:
        return Reference(was.paths[id(x)]) if id(x) in was.paths else x

    return constants.packed(jax.tree.map(pack, out, is_leaf=lambda x: id(x) in was.paths))


def unpacked(out: Any, objects: Any) -> Any:
    """Undoes `packed`: replaces each `Reference` by the object of `objects` with its path."""

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
    """Checks if a value is or contains an array, a variable or a module."""
    if isinstance(x, nnx.Variable | nnx.Pytree):
        return True
    return any(isinstance(leaf, jax.Array | nnx.Pytree) for leaf in jax.tree.leaves(x))


def _arrays(state: nnx.State) -> dict[tuple[Any, ...], list[Any]]:
    return {path: jax.tree.leaves(x) for path, x in nnx.to_flat_state(state)}


def _same(was: list[Any] | None, now: list[Any]) -> bool:
    return was is not None and len(was) == len(now) and all(x is y for x, y in zip(was, now))
