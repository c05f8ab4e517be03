"""How far a model's predictions are from another's, on held-out text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.models.decoder import Decoder

CHUNK = 256
"""Positions whose logits exist at a time."""


class Seen(NamedTuple):
    """A model, and its last hidden states at the positions that carry loss.

    Attributes:
      model: the model; its head makes logits of the states.
      hidden: [N, D], in the compute dtype.
      targets: the token that follows each position, int [N].
    """

    model: Decoder
    hidden: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over target tokens, in nats: KL(reference || model), and the model's own loss."""

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
    """Runs a model over batches, and keeps the states from which it predicts their targets.

    Args:
      model: the model.
      batches: at least one of `held_out_batches`, [B, T].
      dtype: to compute in.
      progress: called once per batch.
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
    """Compares next-token distributions at the positions that carry loss.

    Args:
      reference: the model to be near to.
      model: with the same vocabulary, on the same batches.
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
    # rounding may leave the divergence of equal models a little below zero
    return Divergence(max(float(total[0]) / count, 0.0), float(total[1]) / count, count)


def _filled(part: np.ndarray) -> np.ndarray:
    """Returns at most CHUNK rows as CHUNK rows, zeros at the end."""
    return np.pad(part, [(0, CHUNK - len(part)), *[(0, 0)] * (part.ndim - 1)])
