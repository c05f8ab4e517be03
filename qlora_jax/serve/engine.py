"""Rows of one KV cache that prompts enter and leave while others decode."""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.bank import with_rows
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.adapters import put_adapter
from qlora_jax.models.decoder import Decoder, empty_cache
from qlora_jax.models.generate import (
    SMALLEST,
    RowState,
    Sampling,
    generate_chunk,
    padded_size,
    padded_stops,
    prefill,
    row_keys,
)
from qlora_jax.models.inputs import KVCache


class SamplingSettings(NamedTuple):
    """How a row is drawn; as for `generate`."""

    temperature: float
    top_p: float
    seed: int


class EngineState(NamedTuple):
    """All rows, on the device."""

    cache: KVCache
    rows: RowState
    sampling: Sampling


class Engine:
    """A fixed number of rows that decode together, each under its own adapter and settings.

    The cache has as many positions as the longest open row asks for, padded as `generate` pads
    them, since every token attends over all of it. Decoding is one program for each such size,
    whatever the rows hold; reading a prompt is one per padded length. A row's ids are those of
    `generate` for its prompt, settings and adapter, whatever the others do. One thread at a time
    may use an engine.

    Args:
      model: with banks (`attach_bank`).
      rows: how many.
      length: most positions of a row, prompt and answer together.
      stop_ids: tokens that end a row.
      pad_id: fills what is never seen.
      dtype: of computation and cache.
      smallest: fewest positions of the cache, unless `length` is less; more of them make each token
        slower, and fewer sizes to compile for.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        rows: int,
        length: int,
        stop_ids: Collection[int],
        pad_id: int,
        dtype: jax.typing.DTypeLike,
        smallest: int = SMALLEST,
    ):
        self._smallest = smallest
        self.rows, self.length = rows, length
        self.stop_ids = frozenset(stop_ids)
        self.vocabulary = model.config.vocab_size
        self._model = model
        self._stops, self._pad, self._dtype = padded_stops(stop_ids), pad_id, jnp.dtype(dtype)
        self._structure, self._weights = nnx.split(model)
        self._adapters = np.zeros(rows, np.int32)
        self._open = np.zeros(rows, bool)
        self._ends = np.zeros(rows, np.int64)  # positions of each row that may be written
        zeros = jnp.zeros(rows, jnp.int32)
        self._state = EngineState(
            empty_cache(model.config, rows, min(smallest, length), dtype),
            RowState(zeros, zeros, jnp.ones(rows, bool)),
            Sampling(jnp.zeros(rows), jnp.ones(rows), jax.random.split(jax.random.key(0), rows)),
        )
        self._set_rows()

    def warm_up(self) -> None:
        """Compiles what decodes and what reads short prompts."""
        self.enter(0, [self._pad], 0, SamplingSettings(1.0, 1.0, 0))
        self.advance(1)
        self.leave(0)

    def put_adapter(self, slot: int, adapter: LoraSet) -> None:
        """Writes an adapter into a slot of the banks, which no open row may use."""
        put_adapter(self._model, slot, adapter)
        self._structure, self._weights = nnx.split(self._model)
        self._set_rows()

    def enter(
        self, row: int, prompt: Sequence[int], adapter: int, settings: SamplingSettings
    ) -> int:
        """Reads a prompt into a free row and draws its first token.

        Args:
          row: from 0.
          prompt: token ids, fewer than `length`.
          adapter: slot of the banks.
          settings: of the draws.
        """
        size = min(padded_size(len(prompt)), self.length)
        tokens = np.full((1, size), self._pad, np.int32)
        tokens[0, : len(prompt)] = prompt
        sampling = Sampling(
            jnp.full(1, settings.temperature, jnp.float32),
            jnp.full(1, settings.top_p, jnp.float32),
            row_keys(settings.seed, [prompt]),
        )
        self._ends[row] = len(prompt)
        self._fit(size)
        weights = with_rows(self._weights, np.full(1, adapter, np.int32))
        lengths = np.full(1, len(prompt), np.int32)
        entered, cache = prefill(
            self._structure, weights, tokens, lengths, sampling, self._stops, size, self._dtype
        )
        part = EngineState(cache, entered, sampling)
        self._state = _placed(self._state.cache, self._state.rows, self._state.sampling, part, row)
        self._adapters[row], self._open[row] = adapter, True
        self._set_rows()
        return int(entered.tokens[0])

    def advance(self, steps: int) -> np.ndarray:
        """Draws up to `steps` tokens, at most `generate.CHUNK`, for each open row.

        Returns:
          int32[rows, steps]; what stands after a stop id, or in a row that is not open, is void.
        """
        self._ends += steps
        self._fit(0)
        cache, rows, sampling = self._state
        rows, cache, drawn = generate_chunk(
            self._structure,
            self._decoding,
            cache,
            rows._replace(done=jnp.asarray(~self._open)),
            sampling,
            self._stops,
            self._pad,
            steps,
            self._dtype,
        )
        self._state = EngineState(cache, rows, sampling)
        return np.asarray(drawn)[:, :steps]

    def leave(self, row: int) -> None:
        """Frees a row."""
        self._open[row] = False

    def _fit(self, least: int) -> None:
        """Gives the cache `least` positions, and those that open rows need."""
        config, cache = self._model.config, self._state.cache
        needed = max(least, *np.where(self._open, self._ends, 0).tolist())
        size = min(padded_size(needed, self._smallest), self.length)
        now = cache.k.shape[2]
        if not self._open.any() and size < now:
            cache = empty_cache(config, self.rows, size, self._dtype)
        elif size > now:
            more = [(0, 0), (0, 0), (0, size - now), (0, 0), (0, 0)]
            cache = jax.tree.map(lambda x: jnp.pad(x, more), cache)
        self._state = self._state._replace(cache=cache)

    def _set_rows(self) -> None:
        self._decoding = with_rows(self._weights, self._adapters)


@functools.partial(jax.jit, donate_argnames="cache")
def _placed(
    cache: KVCache, rows: RowState, sampling: Sampling, one: EngineState, row: jax.typing.ArrayLike
) -> EngineState:
    """The state with one row's own in its place; the cache's later positions keep what they have.

    Nothing sees a position before the token that belongs there has been written.
    """

    def cached(all: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(all, part, (0, row, 0, 0, 0))

    def put(all: jax.Array, part: jax.Array) -> jax.Array:
        return all.at[row].set(part[0])

    return EngineState(
        jax.tree.map(cached, cache, one.cache),
        jax.tree.map(put, rows, one.rows),
        jax.tree.map(put, sampling, one.sampling),
    )
