"""Measures how far the predictions of two models differ on held-out text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.models.decoder import Decoder

CHUNK = 256
"""Number of positions whose logits exist at a time."""


class Seen(NamedTuple):
    """A model, and its last hidden states at the positions with loss.

    Attributes:
      model: model; its head computes logits from the hidden states.
      hidden: hidden states, [N, D] in the compute dtype.
      targets: next token of each position, int [N].
    """

    model: Decoder
    hidden: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The mean KL(reference || model) and the mean loss of the model, in nats per target token."""

    kl: float
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))


def see(
    model: Decoder,
    batches: Sequence[Mapping[str, np.ndarray]],
    dtype: jax.typing.DTypeLike,
    progress: Callable[[], None] = lambda: None,
) -> Seen:
    """Runs a model over batches, and stores the hidden states at the positions with loss.

    Args:
      model: model to run.
      batches: batches of `held_out_batches`, at least one, with arrays [B, T].
      dtype: compute dtype.
      progress: function called once per batch.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).hidden(*inputs, dtype=dtype)

    hidden, targets = [], []
    for batch in batches:
        found = run(state, batch["tokens"], batch["segments"], batch["positions"])
        counts = np.asarray(batch["mask"]) > 0
        hidden.append(np.asarray(found)[counts])
        targets.append(np.asarray(batch["targets"])[counts])
        progress()
    return Seen(model, np.concatenate(hidden), np.concatenate(targets))


def divergence(reference: Seen, model: Seen) -> Divergence:
    """Compares the next-token distributions of two models at the positions with loss.

    Args:
      reference: result of `see` for the reference model.
      model: result of `see` for the compared model, with the same vocabulary and batches.
    """
    graphs, states = zip(*(nnx.split(seen.model) for seen in (reference, model)))

    @jax.jit
    def sums(
        states: tuple[nnx.State, ...], x: jax.Array, y: jax.Array, targets: jax.Array, n: jax.Array
    ) -> jax.Array:
        models = [nnx.merge(graph, state) for graph, state in zip(graphs, states)]
        p, q = (jax.nn.log_softmax(m.logits(h)) for m, h in zip(models, (x, y)))
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        loss = -jnp.take_along_axis(q, targets[:, None], axis=-1)[:, 0]
        kept = jnp.arange(len(targets)) < n
        return jnp.stack([jnp.where(kept, v, 0).sum() for v in (kl, loss)])

    count, total = len(model.targets), np.zeros(2)
    for first in range(0, count, CHUNK):
        parts = (reference.hidden, model.hidden, model.targets)
        x, y, targets = (_filled(part[first : first + CHUNK]) for part in parts)
        total += np.asarray(sums(states, x, y, targets, min(CHUNK, count - first)), np.float64)
    # rounding can make the divergence of equal models slightly negative
    return Divergence(max(float(total[0]) / count, 0.0), float(total[1]) / count, count)


def _filled(part: np.ndarray) -> np.ndarray:
    """Pads at most CHUNK rows with zeros to CHUNK rows."""
    return np.pad(part, [(0, CHUNK - len(part)), *[(0, 0)] * (part.ndim - 1)])
