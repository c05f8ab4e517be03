"""How far a model's predictions are from another's, on held-out text."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.models.decoder import Decoder

CHUNK = 256
"""Positions whose logits exist at a time."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over target tokens, in nats: KL(reference || model), and the model's own loss."""

    kl: float
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))


def divergence(
    reference: Decoder,
    model: Decoder,
    batches: Sequence[Mapping[str, np.ndarray]],
    dtype: jax.typing.DTypeLike,
) -> Divergence:
    """Compares next-token distributions at the positions that carry loss.

    Args:
      reference: the model to be near to.
      model: with the same vocabulary.
      batches: of `held_out_batches`, [B, T].
      dtype: to compute both in.
    """
    graphs, states = zip(*(nnx.split(m) for m in (reference, model)))

    @jax.jit
    def sums(states: tuple[nnx.State, ...], batch: Mapping[str, jax.Array]) -> jax.Array:
        models = [nnx.merge(graph, state) for graph, state in zip(graphs, states)]
        inputs = [batch[key] for key in ("tokens", "segments", "positions")]
        hidden = [_chunks(m.hidden(*inputs, dtype=dtype)) for m in models]
        targets, mask = _chunks(batch["targets"][..., None]), _chunks(batch["mask"][..., None])

        def chunk(parts: tuple[jax.Array, ...]) -> jax.Array:
            x, y, target, counts = parts
            p, q = (jax.nn.log_softmax(m.logits(h)) for m, h in zip(models, (x, y)))
            kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
            loss = -jnp.take_along_axis(q, target, axis=-1)[..., 0]
            kept = counts[..., 0] > 0
            return jnp.stack([jnp.where(kept, v, 0).sum() for v in (kl, loss, 1.0 * kept)])

        return jax.lax.map(chunk, (*hidden, targets, mask)).sum(axis=0)

    totals = sum(np.asarray(sums(states, dict(batch)), np.float64) for batch in batches)
    kl, loss, count = (float(total) for total in np.asarray(totals))
    # rounding may leave the divergence of equal models a little below zero
    return Divergence(max(kl / count, 0.0), loss / count, int(count))


def _chunks(x: jax.Array) -> jax.Array:
    """[B, T, n] as [chunks, CHUNK, n], filled up with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    flat = jnp.pad(flat, ((0, -flat.shape[0] % CHUNK), (0, 0)))
    return flat.reshape(-1, CHUNK, flat.shape[-1])
