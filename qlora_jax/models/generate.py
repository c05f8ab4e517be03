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
"""Prompts and caches are padded to SMALLEST · 2ⁿ, so that few different programs are compiled."""

CHUNK = 16
"""Tokens per row that the device generates before the host reads them."""


class Sampling(NamedTuple):
    """Settings for drawing the next token; no value of them needs another compiled program.

    Temperature and top_p are one number for all rows, or one number per row.
    """

    temperature: jax.Array | float
    top_p: jax.Array | float
    keys: jax.Array
    """Random keys, one per row."""


class RowState(NamedTuple):
    """State of each row of a batch in generation."""

    tokens: jax.Array
    """int32[B], the tokens drawn last; the cache does not have them yet."""
    positions: jax.Array
    """int32[B], the positions of `tokens`."""
    done: jax.Array
    """bool[B], whether the row drew a stop id."""


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
    """Generates a continuation of every prompt.

    The text of a row depends on its prompt and the seed, not on the other rows. Equal prompts with
    the same adapter in one batch have independent random draws.

    Args:
      model: model with or without adapters.
      prompts: token ids of each prompt; the lengths may differ.
      max_new_tokens: largest number of new tokens per row.
      stop_ids: token ids that end a row.
      pad_id: token id that fills shorter and finished rows; no token sees it.
      dtype: compute dtype, also the dtype of the cache.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: probability p; a token is drawn from the smallest set of most likely tokens whose
        probabilities add up to p or more.
      seed: seed of the random draws.
      adapters: each row's slot in the model's banks; None for a model without banks.
      on_tokens: callback with the new ids of each row, called after the first token and then after
        every `CHUNK` tokens; an exception in it ends the generation.
      mesh: devices over which the weights are split; None: one device.

    Returns:
      The new ids of each row, without the stop id.

    Raises:
      UserError: a prompt is empty, holds an id outside the vocabulary or is too long, or a setting
        is out of its range.
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
    """Returns the smallest value of `smallest` · 2ⁿ, n >= 0, that is not below `size`."""
    padded = smallest
    while padded < size:
        padded *= 2
    return padded


def padded_stops(stop_ids: Collection[int]) -> np.ndarray:
    """Returns the ids, padded with -1 to 8 · 2ⁿ entries, so that few programs are compiled."""
    stops = np.full(padded_size(len(stop_ids), 8), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    return stops


def row_keys(
    seed: int, prompts: Sequence[Sequence[int]], adapters: Sequence[int] | None = None
) -> jax.Array:
    """Returns one random key per row.

    The key depends on the seed, the prompt, and the number of equal rows (same prompt and adapter)
    above the row.
    """
    return _row_keys(np.uint32(seed & 0xFFFFFFFF), _ids(prompts, adapters))


def draw(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, int32[B], from float32 logits[B, vocab]."""
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
        # Back to the order of the vocabulary: each token, not each rank, gets its noise. So the
        # draw stays the same if rounding swaps two tokens of nearly equal probability.
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
    """Fills the cache with the prompts and draws the first token of each row.

    Padding behind a shorter prompt writes to its cache slots too. No token sees such a slot before
    the generated token of that position overwrites it.
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
    """Draws up to `steps` tokens per row; stops early if all rows are done.

    Returns:
      The new state of the rows, the cache, and the drawn tokens int32[B, CHUNK], padded with
      `pad_id`.
    """
    if mesh is None and for_a_cpu():
        # On a CPU, decode the scales once for all tokens. A GPU kernel decodes them itself, and so
        # reads fewer bytes.
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
    """Draws the tokens of `generate_chunk` on one device, with the device's part of the weights."""
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
    """Returns a hash per row of its prompt and the number of equal rows above it."""
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
    """Returns the largest length of a generated sequence, in words for a message."""
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
