"""Decodes the rows of one KV cache; prompts enter and leave a row while other rows decode."""

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
    """Settings for drawing the tokens of a row, as in `generate`."""

    temperature: float
    top_p: float
    seed: int


class EngineState(NamedTuple):
    """State of all rows, on the device."""

    cache: KVCache
    rows: RowState
    sampling: Sampling


class Engine:
    """A fixed number of rows that decode together, each with its own adapter and settings.

    Every token attends over the whole cache, so the cache has only the positions that the longest
    open row needs, padded as in `generate`. One decoding program is compiled per cache size, and
    one prefill program per padded prompt length. The ids of a row equal the ids of `generate` for
    the same prompt, settings and adapter; they do not depend on the other rows. Only one thread at
    a time may use an engine.

    Args:
      model: model with banks (`attach_bank`).
      rows: number of rows.
      length: largest number of positions of a row, prompt and answer together.
      stop_ids: token ids that end a row.
      pad_id: token id for padding; no token sees it.
      dtype: compute dtype, also the dtype of the cache.
      smallest: smallest number of positions of the cache, unless `length` is smaller. With a larger
        value each token takes longer, but fewer cache sizes are compiled.
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
        self._ends = np.zeros(rows, np.int64)  # number of positions that each row may have written
        zeros = jnp.zeros(rows, jnp.int32)
        self._state = EngineState(
            empty_cache(model.config, rows, min(smallest, length), dtype),
            RowState(zeros, zeros, jnp.ones(rows, bool)),
            Sampling(jnp.zeros(rows), jnp.ones(rows), jax.random.split(jax.random.key(0), rows)),
        )
        self._set_rows()

    def warm_up(self) -> None:
        """Compiles the decoding program and the prefill program for short prompts."""
        self.enter(0, [self._pad], 0, SamplingSettings(1.0, 1.0, 0))
        self.advance(1)
        self.leave(0)

    def put_adapter(self, slot: int, adapter: LoraSet) -> None:
        """Writes an adapter into a slot of the banks; no open row may use this slot."""
        put_adapter(self._model, slot, adapter)
        self._structure, self._weights = nnx.split(self._model)
        self._set_rows()

    def enter(
        self, row: int, prompt: Sequence[int], adapter: int, settings: SamplingSettings
    ) -> int:
        """Reads a prompt into a free row and draws its first token.

        Args:
          row: number of the row, from 0.
          prompt: token ids, fewer than `length`.
          adapter: number of the adapter's slot in the banks.
          settings: settings for drawing the tokens.

        Returns:
          The first token id.
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
          The ids, int32[rows, steps]. Ids after a stop id, and ids of rows that are not open, have
          no meaning.
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
        """Resizes the cache to hold `least` positions and the positions of all open rows."""
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
    """Returns the state with the row's part replaced by the state of one prompt.

    Positions after the prompt keep old values in the cache. No token attends to such a position
    before a new token has been written there.
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
