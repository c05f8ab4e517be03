"""Loss of a model on plain text, in windows that do not overlap."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.models.decoder import Decoder
from qlora_jax.train.loss import token_loss


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """`windows` is the summed loss of each window in nats, `tokens` the predictions of all."""

    windows: tuple[float, ...]
    tokens: int

    @property
    def loss(self) -> float:
        """Mean nats per predicted token."""
        return math.fsum(self.windows) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def text_loss(
    model: Decoder,
    ids: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    batch: int = 4,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> TextLoss:
    """Cuts a text into whole windows and sums each one's loss.

    The first token of a window is given, not predicted; what is left over at the end is not read.

    Args:
      model: with or without adapters.
      ids: the text's tokens.
      window: tokens in a window.
      batch: windows at a time.
      dtype: compute dtype.

    Raises:
      UserError: a text of less than one window.
    """
    count = len(ids) // window
    if not count:
        raise UserError(f"the text has {len(ids)} tokens, less than one window of {window}")
    rows = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    structure, weights = nnx.split(model)
    sums: list[float] = []
    for start in range(0, count, batch):
        part = rows[start : start + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
        losses = _window_losses(structure, weights, padded, jnp.dtype(dtype))
        sums += np.asarray(losses)[: len(part)].tolist()
    return TextLoss(tuple(sums), count * (window - 1))


@functools.partial(jax.jit, static_argnames=("structure", "dtype"))
def _window_losses(
    structure: nnx.GraphDef, weights: nnx.State, rows: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    model: Decoder = nnx.merge(structure, weights)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden = model.hidden(inputs, jnp.zeros_like(inputs), positions, dtype=dtype)
    head, axis = model.stored_head()

    def one(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = x
        mask = jnp.ones(targets.shape, bool)
        return token_loss(hidden, head, targets, mask, vocab_axis=axis)[0]

    return jax.lax.map(one, (hidden, targets))
