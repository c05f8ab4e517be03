"""Computes a hash of a model's pretrained weights, to see whether two models have the same base.

A hash is a version, a colon and SHA-256 as hex, such as 2:9f86d0…. Hashes of different versions
cannot be compared, so `like` computes a model's hash in the version of an earlier hash.
The definition of a version never changes.

Version 2 hashes names and values. It does not depend on the packing, stacking, sharding or dtype
of a weight. Each parameter has four sums modulo 2³², over its elements at row r and column c in
the checkpoint (a vector is one row):

    Σ mix(bits ^ (mix(r + ROWS[i]) + mix(c + COLUMNS[i])))        i = 0, 1, 2, 3

mix is the finalizer of MurmurHash3's 32-bit variant; bits are the 32 bits of the element as
float32. The elements of a 4-bit weight are its decoded values. -0 and numbers below the smallest
normal number count as zero, because some devices flush them to zero. The hash is SHA-256 of lines
of text with these sums, see `_digest`.

Why the hash detects a change: mix maps the 32-bit numbers one to one, so a change of one element
changes all four sums. Several changes cancel by chance with probability 2⁻³² in one sum and 2⁻¹²⁸
in all four. The order of the additions does not matter. The sums are computed on the devices that
hold the weights; only the sums are copied to the host.

Version 1 is SHA-256 of the paths, dtypes, shapes and bytes of the frozen tree (method full: of the
trained tree), copied to the host. The constants of an adapter are part of that tree.
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
from qlora_jax.runtime.mesh import replicated_sharding

ROWS = (0x9E3779B9, 0xBF58476D, 0x94D049BB, 0xD6E8FEB8)
COLUMNS = (0x7F4A7C15, 0x1CE4E5B9, 0x133111EB, 0x6659FD93)
"""Offsets of the row and column numbers of the four sums: halves of the constants of SplitMix64 and
of related generators. Rows and columns have different offsets, so a transpose has another hash."""


def base_hash(model: Decoder, method: str) -> str:
    """Returns the hash of the model's pretrained weights, without adapters, in the newest version.

    Args:
      model: the model; method full trains the pretrained weights, so the hash changes in training.
      method: qlora, lora or full.
    """
    return _hash(model, method, NEWEST)


def like(before: str | None, model: Decoder, method: str) -> str:
    """Returns the hash of the model's pretrained weights in the version of the hash `before`.

    Args:
      before: an earlier hash; None selects the newest version.
      model: the model.
      method: qlora, lora or full.

    Raises:
      UserError: this program does not know the version of `before`.
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
    """Returns every stored parameter with its four sums, one uint32[4] for each layer of its stack.

    A parameter outside the layers has one uint32[4]. One program sums the layers of a stack one
    after the other, so at most one layer's matrix is decoded at a time. (With a loop inside the
    program, XLA:CPU converts a whole stack of 16-bit floats to float32 before the loop.)
    """
    found = []
    for part in stored(model):
        rows, columns = (1, *_shape(part))[-2:]
        keys = _keys(rows, ROWS), _keys(columns, COLUMNS)
        home = replicated_sharding(part.value)
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
    """Returns SHA-256 of text such as "base 2\\nlm_head.weight 256x64 0123…\\n".

    The four sums of a parameter are 32 hex digits. The lines are sorted by name.

    Args:
      parameters: name to (shape in the checkpoint, sums uint32[4]).
    """
    lines = ["base 2\n"]
    for name, (shape, four) in sorted(parameters.items()):
        lines.append(f"{name} {'x'.join(map(str, shape))} {''.join(f'{x:08x}' for x in four)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _shape(part: StoredParameter) -> tuple[int, ...]:
    shape = part.value.shape[1:] if part.stacked else part.value.shape
    return shape[::-1] if part.transposed else shape


def _keys(count: int, starts: tuple[int, ...]) -> jax.Array:
    """Returns mix(n + start) for n = 0 … count - 1 and each of the four starts, uint32[4, count].

    `_sums` takes the result as an argument; inside its program, XLA would compute mix again for
    every element.
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
    """Returns the four sums of one parameter, uint32[4].

    Args:
      value: the parameter, or its stack over the layers.
      layer: index in the stack; None if `value` is not a stack.
      rows: keys of the rows in the checkpoint, uint32[4, rows].
      columns: keys of the columns in the checkpoint, uint32[4, columns].
      transposed: whether the model holds the matrix as [columns, rows].
      home: replicated sharding on the mesh that holds `value`; None for one device.
    """
    if layer is not None:
        value = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), value)
    if home is not None:
        # Gather one layer in its stored form (4-bit codes or 16-bit floats), before decoding.
        value = jax.lax.with_sharding_constraint(value, home)
    number = to_float32(value)
    bits = jax.lax.bitcast_convert_type(jnp.atleast_2d(number), jnp.uint32)
    bits = jnp.where(bits & 0x7F800000 == 0, jnp.uint32(0), bits)
    down, across = (columns, rows) if transposed else (rows, columns)
    terms = [_mix(bits ^ (d[:, None] + a)) for d, a in zip(down, across)]
    # One reduction for all four sums: with four reductions, XLA:CPU writes the terms to memory.
    zeros = [jnp.uint32(0)] * len(terms)
    return jnp.stack(jax.lax.reduce(terms, zeros, _add, (0, 1)))


def _add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(left, right)]


def _mix(x: Any) -> Any:
    """Applies the finalizer of MurmurHash3's 32-bit variant (Appleby), one to one on uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
