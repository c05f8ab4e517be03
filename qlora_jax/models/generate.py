"""Text generation with a KV cache, for a batch of prompts of any lengths."""

import functools
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qlora_jax.kernels.target import for_a_cpu
from qlora_jax.lora.bank import with_rows
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, empty_cache
from qlora_jax.models.inputs import KVCache
from qlora_jax.models.sharding import on_mesh
from qlora_jax.quant import QTensor
from qlora_jax.quant.qtensor import with_plain_scales
from qlora_jax.runtime.errors import UserError

SMALLEST = 64
"""Prompts and caches are padded to this times a power of two, so that few programs compile."""

CHUNK = 16
"""Tokens decoded on the device between two looks at them on the host."""


class Sampling(NamedTuple):
    """How the next token is drawn; every field may differ without a new program.

    Temperature and top_p are one number for all rows, or one per row.
    """

    temperature: jax.Array | float
    top_p: jax.Array | float
    keys: jax.Array
    """One random key per row."""


class RowState(NamedTuple):
    """Where each row stands."""

    tokens: jax.Array
    """int32[B], drawn last and not in the cache yet."""
    positions: jax.Array
    """int32[B], where they belong."""
    done: jax.Array
    """bool[B], a stop id was drawn."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    dtype: jax.typing.DTypeLike,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapters: Sequence[int] | None = None,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    A row's text depends on its prompt and the seed, not on the other rows; equal prompts in a
    batch, under the same adapter, are drawn independently.

    Args:
      model: with or without adapters.
      prompts: token ids; the lengths may differ.
      max_new_tokens: most tokens per row.
      stop_ids: tokens that end a row.
      pad_id: fills rows that are shorter or done; it is never seen.
      dtype: of computation and cache.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draws from the fewest tokens that together have this probability.
      seed: of the draws.
      adapters: each row's slot in the model's banks; None for a model without banks.
      on_tokens: called after the first token and then every `CHUNK` with each row's new ids; an
        exception it raises ends the generation.
      mesh: the devices over which the weights are split; None is one device.

    Returns:
      The new ids of each row, without the stop id.

    Raises:
      UserError: a prompt that is empty, holds an id outside the vocabulary or leaves too little
        room, or a setting out of its range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    if not prompts:
        return []
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.full((len(prompts), padded_size(lengths.max())), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    structure, weights = nnx.split(model)
    if adapters is not None:
        weights = with_rows(weights, np.array(adapters, np.int32))
    dtype = jnp.dtype(dtype)
    slots = padded_size(lengths.max() + max_new_tokens)
    sampling = Sampling(temperature, top_p, row_keys(seed, prompts, adapters))
    stops = padded_stops(stop_ids)

    rows, cache = prefill(structure, weights, tokens, lengths, sampling, stops, slots, dtype, mesh)
    new = np.asarray(rows.tokens)[:, None]
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    left = max_new_tokens - 1
    while True:
        fresh = [_until(ids, stop_ids) if r in open_rows else [] for r, ids in enumerate(new)]
        open_rows -= {r for r, ids in enumerate(fresh) if len(ids) < new.shape[1]}
        for result, ids in zip(results, fresh):
            result.extend(ids)
        if on_tokens is not None:
            on_tokens(fresh)
        if not left or not open_rows:
            return results
        steps = min(CHUNK, left)
        rows, cache, drawn = generate_chunk(
            structure, weights, cache, rows, sampling, stops, pad_id, steps, dtype, mesh
        )
        new = np.asarray(drawn)[:, :steps]
        left -= steps


def padded_size(size: int, smallest: int = SMALLEST) -> int:
    """The least `smallest` times a power of two that holds `size`."""
    padded = smallest
    while padded < size:
        padded *= 2
    return padded


def padded_stops(stop_ids: Collection[int]) -> np.ndarray:
    """The ids, and -1 up to a few lengths."""
    stops = np.full(padded_size(len(stop_ids), 8), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    return stops


def row_keys(
    seed: int, prompts: Sequence[Sequence[int]], adapters: Sequence[int] | None = None
) -> jax.Array:
    """A random key per row, made of seed and prompt and of how many equal rows stand above it."""
    return _row_keys(np.uint32(seed & 0xFFFFFFFF), _ids(prompts, adapters))


def draw(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32[B], from float32 logits[B, vocab]."""
    temperature, top_p = (jnp.broadcast_to(x, logits.shape[:1])[:, None] for x in sampling[:2])

    def likeliest() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(temperature > 0, temperature, 1)
        order = jnp.argsort(-scaled, axis=-1)
        p = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
        kept = (jnp.cumsum(p, axis=-1) - p < top_p) | (top_p >= 1)
        kept = kept.at[:, 0].set(True)
        # back in the vocabulary's order: noise that belongs to a token and not to its rank keeps
        # the draw when rounding swaps two neighbours
        kept = jnp.put_along_axis(kept, order, kept, axis=-1, inplace=False)
        masked = jnp.where(kept, scaled, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(sampling.keys, masked).astype(jnp.int32)
        return jnp.where(temperature[:, 0] > 0, drawn, likeliest())

    return jax.lax.cond((temperature > 0).any(), sampled, likeliest)


@functools.partial(jax.jit, static_argnames=("structure", "slots", "dtype", "mesh"))
def prefill(
    structure: nnx.GraphDef,
    weights: nnx.State,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    stops: jax.Array,
    slots: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> tuple[RowState, KVCache]:
    """Reads the prompts and draws each row's first token.

    A padded place writes to a slot that nothing sees until the token of that position replaces it.
    """

    def first(weights: nnx.State, tokens: jax.Array, lengths: jax.Array, *rest: Any) -> Any:
        model = nnx.merge(structure, weights)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache = empty_cache(model.config, tokens.shape[0], slots, dtype)
        hidden, cache = model.cached(tokens, positions, cache, dtype=dtype)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return _next(model, last, lengths, *rest), cache

    return on_mesh(mesh, first, weights, tokens, lengths, sampling, stops)


@functools.partial(
    jax.jit, static_argnames=("structure", "dtype", "mesh"), donate_argnames=("cache",)
)
def generate_chunk(
    structure: nnx.GraphDef,
    weights: nnx.State,
    cache: KVCache,
    rows: RowState,
    sampling: Sampling,
    stops: jax.Array,
    pad_id: jax.Array,
    steps: jax.Array,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> tuple[RowState, KVCache, jax.Array]:
    """Draws up to `steps` tokens a row into int32[B, CHUNK], fewer once every row is done."""
    if mesh is None and for_a_cpu():
        # Once, not for every token. A GPU's kernels decode them as they go, and read less.
        weights = jax.tree.map(with_plain_scales, weights, is_leaf=lambda x: isinstance(x, QTensor))
    drawn = functools.partial(_drawn, structure, dtype)
    return on_mesh(mesh, drawn, weights, cache, rows, sampling, stops, pad_id, steps)


def _drawn(
    structure: nnx.GraphDef,
    dtype: jnp.dtype,
    weights: nnx.State,
    cache: KVCache,
    rows: RowState,
    sampling: Sampling,
    stops: jax.Array,
    pad_id: jax.Array,
    steps: jax.Array,
) -> tuple[RowState, KVCache, jax.Array]:
    """Draws tokens as `generate_chunk` does, with the weights as a model is made of."""
    model = nnx.merge(structure, weights)

    def proceed(state: tuple[jax.Array, RowState, KVCache, jax.Array]) -> jax.Array:
        step, rows, _, _ = state
        return (step < steps) & ~rows.done.all()

    def step_once(
        state: tuple[jax.Array, RowState, KVCache, jax.Array],
    ) -> tuple[jax.Array, RowState, KVCache, jax.Array]:
        step, rows, cache, drawn = state
        hidden, cache = model.cached(
            rows.tokens[:, None], rows.positions[:, None], cache, dtype=dtype
        )
        after = _next(model, hidden[:, 0], rows.positions + 1, sampling, stops)
        after = RowState(
            tokens=jnp.where(rows.done, pad_id, after.tokens),
            positions=jnp.where(rows.done, rows.positions, after.positions),
            done=rows.done | after.done,
        )
        return step + 1, after, cache, drawn.at[:, step].set(after.tokens)

    drawn = jnp.full((rows.tokens.shape[0], CHUNK), pad_id, jnp.int32)
    _, rows, cache, drawn = jax.lax.while_loop(
        proceed, step_once, (jnp.int32(0), rows, cache, drawn)
    )
    return rows, cache, drawn


def _next(
    model: Decoder, hidden: jax.Array, positions: jax.Array, sampling: Sampling, stops: jax.Array
) -> RowState:
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, positions)
    tokens = draw(model.logits(hidden), sampling._replace(keys=keys))
    return RowState(tokens, positions, (tokens[:, None] == stops).any(axis=-1))


@jax.jit
def _row_keys(seed: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)


def _ids(prompts: Sequence[Sequence[int]], adapters: Sequence[int] | None) -> np.ndarray:
    """A number per row made of its prompt and of how many equal rows stand above it."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    ids = []
    for row in zip(adapters or [0] * len(prompts), map(tuple, prompts)):
        ids.append(zlib.crc32(np.array([seen.count(row), *row[1]], np.int32).tobytes()))
        seen.append(row)
    return np.array(ids, np.uint32)


def _until(ids: np.ndarray, stop_ids: Collection[int]) -> list[int]:
    kept = []
    for i in ids.tolist():
        if i in stop_ids:
            break
        kept.append(i)
    return kept


def cached_positions(config: DecoderConfig) -> str:
    """Returns how many positions a generated sequence may have, in words for a message."""
    why = ", beyond which its rope scaling changes" if config.varying_rope else ""
    return f"{config.longest_cached} positions{why}"


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    vocabulary, room = model.config.vocab_size, model.config.longest_cached
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is not allowed; give 1 or more")
    if not temperature >= 0:
        raise UserError(f"temperature {temperature} is not allowed; give 0 or more")
    if not 0 <= top_p <= 1:
        raise UserError(f"top_p {top_p} is not allowed; give a probability from 0 to 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(
                f"prompt {row} holds an id outside the model's vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        if len(prompt) + max_new_tokens > room:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, which with {max_new_tokens} new ones is "
                f"more than the model's {cached_positions(model.config)}; shorten the prompt or "
                "max_new_tokens"
            )
