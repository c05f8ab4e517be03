"""A hash of a model's pretrained weights: whether two models have the same base.

A hash is a version, a colon and SHA-256 as hex, such as 2:9f86d0…. Hashes of two versions say
nothing about each other, so `like` gives a model's hash in the version of an earlier one.
What a version means never changes.

Version 2 is over names and values. It does not depend on how a weight is packed, stacked or
sharded, nor on the dtype that holds it. Each parameter has four sums modulo 2³², over its elements
at row r and column c in the checkpoint (a vector is one row):

    Σ mix(bits ^ (mix(r + ROWS[i]) + mix(c + COLUMNS[i])))        i = 0, 1, 2, 3

mix is the finalizer of MurmurHash3's 32-bit variant, and bits are those of the element as float32.
A 4-bit weight counts by its decoded numbers. What some devices flush to zero counts as zero:
numbers below the smallest normal one, and -0. SHA-256 is of lines of text, see `_digest`.

Why this holds: mix maps the 32-bit numbers one to one, so an element that changes alone changes
all four sums. Several changes cancel by chance in one sum of 2³², in all four of 2¹²⁸. A sum has
no order. The sums are taken where the weights are, and they alone are copied to the host.

Version 1 is SHA-256 of the bytes of the frozen tree (method full: of the trained tree), copied to
the host, with the tree's paths and shapes. An adapter's constants are among them.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.stored import StoredParameter, stored
from qlora_jax.quant import QTensor, to_float32
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import mesh_place

ROWS = (0x9E3779B9, 0xBF58476D, 0x94D049BB, 0xD6E8FEB8)
COLUMNS = (0x7F4A7C15, 0x1CE4E5B9, 0x133111EB, 0x6659FD93)
"""Where each sum starts to count rows and columns: halves of the constants of SplitMix64 and of
its kin. Rows and columns start apart, so that a transpose has another hash."""


def base_hash(model: Decoder, method: str) -> str:
    """The hash of the model's pretrained weights in the newest version; adapters are not in it.

    Args:
      model: any; method full trains its weights, so its hash changes.
      method: qlora, lora or full.
    """
    return _hash(model, method, NEWEST)


def like(before: str | None, model: Decoder, method: str) -> str:
    """The hash of the model's pretrained weights in the version of the hash `before`.

    Args:
      before: an earlier hash; None asks for the newest version.
      model: any.
      method: qlora, lora or full.

    Raises:
      UserError: this program does not know the version.
    """
    version = before.partition(":")[0] if before else NEWEST
    if version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise UserError(
            f"base_hash {before}: version {version} is not known, only {known}; use the "
            "qlora_jax that wrote it, or a newer one"
        )
    return _hash(model, method, version)


def sums(model: Decoder) -> list[tuple[StoredParameter, list[jax.Array]]]:
    """Every parameter, or stack of one, with the four sums of each layer, uint32[4] each.

    Layers of a stack are summed by one program, one after the other, so no more than one layer's
    matrix is ever decoded. (A loop in the program would make XLA:CPU convert a whole stack of
    16-bit floats to float32 before it.)
    """
    found = []
    for part in stored(model):
        rows, columns = (1, *_shape(part))[-2:]
        keys = _keys(rows, ROWS), _keys(columns, COLUMNS)
        home = mesh_place(part.value)
        layers = [
            _sums(part.value, i if part.stacked else None, *keys, part.transposed, home)
            for i in range(len(part.names))
        ]
        found.append((part, layers))
    return found


def _hash(model: Decoder, method: str, version: str) -> str:
    return f"{version}:{VERSIONS[version](model, method)}"


def _version_1(model: Decoder, method: str) -> str:
    _, trained, frozen = trees.split(model, method)
    return trees.sha256(trained if method == "full" else frozen)


def _version_2(model: Decoder, method: str) -> str:
    parts, found = zip(*sums(model))
    parameters: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for part, layers in zip(parts, jax.device_get(found)):
        parameters |= {name: (_shape(part), four) for name, four in zip(part.names, layers)}
    return _digest(parameters)


VERSIONS: Mapping[str, Callable[[Decoder, str], str]] = {"1": _version_1, "2": _version_2}
NEWEST = "2"


def _digest(parameters: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    """SHA-256 of text such as "base 2\\nlm_head.weight 256x64 0123…\\n", sums as 32 hex digits.

    Args:
      parameters: shape in the checkpoint and sums uint32[4], by name; the lines are sorted by it.
    """
    lines = ["base 2\n"]
    for name, (shape, four) in sorted(parameters.items()):
        lines.append(f"{name} {'x'.join(map(str, shape))} {''.join(f'{x:08x}' for x in four)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _shape(part: StoredParameter) -> tuple[int, ...]:
    shape = part.value.shape[1:] if part.stacked else part.value.shape
    return shape[::-1] if part.transposed else shape


def _keys(count: int, starts: tuple[int, ...]) -> jax.Array:
    """mix(n + start) for n below `count`, uint32[4, count].

    An argument of the program, which would else mix them again for every element.
    """
    numbers = np.arange(count, dtype=np.uint32) + np.array(starts, np.uint32)[:, None]
    return jnp.asarray(_mix(numbers))


@functools.partial(jax.jit, static_argnames=("transposed", "home"))
def _sums(
    value: jax.Array | QTensor,
    layer: int | None,
    rows: jax.Array,
    columns: jax.Array,
    transposed: bool,
    home: NamedSharding | None = None,
) -> jax.Array:
    """The four sums of one parameter, uint32[4].

    Args:
      value: the parameter, or a stack of it.
      layer: its place in the stack; None without one.
      rows: their keys, uint32[4, rows].
      columns: likewise.
      transposed: whether `value` has columns before rows.
      home: every device of the mesh that `value` is on; None for one device.
    """
    if layer is not None:
        value = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), value)
    if home is not None:
        # one layer, gathered as it is stored
        value = jax.lax.with_sharding_constraint(value, home)
    number = to_float32(value)
    bits = jax.lax.bitcast_convert_type(jnp.atleast_2d(number), jnp.uint32)
    bits = jnp.where(bits & 0x7F800000 == 0, jnp.uint32(0), bits)
    down, across = (columns, rows) if transposed else (rows, columns)
    terms = [_mix(bits ^ (d[:, None] + a)) for d, a in zip(down, across)]
    # One reduction of all four: XLA:CPU would write the terms of a sum of its own to memory.
    zeros = [jnp.uint32(0)] * len(terms)
    return jnp.stack(jax.lax.reduce(terms, zeros, _add, (0, 1)))


def _add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(left, right)]


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3's 32-bit variant (Appleby), one to one on uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
