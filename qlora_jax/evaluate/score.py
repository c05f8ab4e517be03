"""Computes log-likelihoods of given continuations of any length, in batches."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.generate import padded_size
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import Tokenizer

POSITIONS = 32
"""Number of positions of every row whose logits exist at a time."""
SMALLEST = 8
"""Scored positions are padded to `SMALLEST` times a power of two, so that few programs compile."""


class Pair(NamedTuple):
    """The token ids of a context, at least one, and those of the continuation to score."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, summed over its tokens.

    `greedy` is True if each token is the likeliest one at its position.
    """

    log_likelihood: float
    greedy: bool


def score(
    model: Decoder,
    pairs: Sequence[Pair],
    *,
    dtype: jax.typing.DTypeLike,
    pad_id: int,
    batch_size: int,
    max_length: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Score]:
    """Computes the score of every continuation.

    A pair with more than `max_length` + 1 ids is cut on the left, as in lm-evaluation-harness. The
    last id is only predicted, so it needs no position.

    Args:
      model: model with or without adapters.
      pairs: pairs to score, of any length.
      dtype: compute dtype; the log-softmax is float32.
      pad_id: id that fills the rows; no token attends to it.
      batch_size: rows in a batch.
      max_length: number of positions; None takes that of the model.
      advance: function called with the number of newly scored pairs.

    Raises:
      UserError: a context is empty, or a continuation is longer than `max_length`.
    """
    limit = max_length or model.config.longest
    for place, pair in enumerate(pairs):
        if not pair.context:
            raise UserError(f"pair {place}: an empty context predicts nothing; give one token")
        if len(pair.continuation) > limit:
            raise UserError(
                f"pair {place}: a continuation of {len(pair.continuation)} tokens does not fit "
                f"{limit} positions; shorten it"
            )
    structure, weights = nnx.split(model)
    scores = [Score(0.0, True)] * len(pairs)
    # the longest first: if memory suffices for the first batch, it suffices for all
    lengths = [len(pair.context) + len(pair.continuation) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        arrays = _fill([pairs[i] for i in batch], limit, batch_size, pad_id)
        logps, hits = jax.device_get(_score(structure, weights, *arrays, jnp.dtype(dtype)))
        for row, i in enumerate(batch):
            n = len(pairs[i].continuation)
            total = float(logps[row, :n].sum(dtype=np.float64))
            scores[i] = Score(total, bool(hits[row, :n].all()))
        advance(len(batch))
    return scores


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encodes a context and its continuation.

    The two are encoded as one text, so that the tokens of the continuation are those that the model
    saw in training. White space at the end of the context belongs to the continuation. An empty
    context becomes the begin-of-text id, or the end-of-text id if the tokenizer has no
    begin-of-text id.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    if not context:
        return Pair(head or [tokenizer.eos_id], tokenizer.encode(continuation))
    given = tokenizer.encode(context)
    return Pair([*head, *given], tokenizer.encode(context + continuation)[len(given) :])


def rolling(ids: Sequence[int], first: int, length: int) -> list[Pair]:
    """Cuts a text into pairs that score each id once, in windows of `length` positions.

    The last window begins earlier, so that it has `length` positions too and gives its ids more
    context (lm-evaluation-harness, `get_rolling_token_windows` with a context of 1).

    Args:
      ids: token ids of the text.
      first: id that precedes the text.
      length: number of positions in a window.
    """
    given = [first, *ids]
    pairs = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        # the position of given[i] predicts ids[i]
        pairs.append(Pair(given[max(0, end - length) : start + 1], ids[start:end]))
    return pairs


def _fill(
    pairs: Sequence[Pair], limit: int, rows: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens and segments [B, T], and places and targets [B, C] of the scored positions."""
    whole = [[*p.context, *p.continuation][-(limit + 1) :] for p in pairs]
    width = min(padded_size(max(len(ids) - 1 for ids in whole)), limit)
    scored = padded_size(max(len(p.continuation) for p in pairs), SMALLEST)
    tokens = np.full((rows, width), pad_id, np.int32)
    segments = np.zeros((rows, width), np.int32)
    places, targets = np.zeros((2, rows, scored), np.int32)
    for row, (pair, ids) in enumerate(zip(pairs, whole)):
        n = len(pair.continuation)
        tokens[row, : len(ids) - 1] = ids[:-1]
        segments[row, : len(ids) - 1] = 1
        places[row, :n] = np.arange(len(ids) - 1 - n, len(ids) - 1)
        targets[row, :n] = pair.continuation
    return tokens, segments, places, targets


@functools.partial(jax.jit, static_argnames=("structure", "dtype"))
def _score(
    structure: nnx.GraphDef,
    weights: nnx.State,
    tokens: jax.Array,
    segments: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Returns float32[B, C] log-likelihoods of the targets, and bool[B, C], True for the likeliest.

    The logits of `POSITIONS` positions of every row exist at a time.
    """
    model: Decoder = nnx.merge(structure, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, segments, positions, dtype=dtype)
    wanted = jnp.take_along_axis(hidden, places[..., None], axis=1)

    def one(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, ids = xs
        logits = model.logits(states)
        own = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
        logp = own - jax.nn.logsumexp(logits, axis=-1)
        return logp, jnp.argmax(logits, axis=-1) == ids

    columns = (wanted.swapaxes(0, 1), targets.T)
    logps, hits = jax.lax.map(one, columns, batch_size=POSITIONS)
    return logps.T, hits.T
