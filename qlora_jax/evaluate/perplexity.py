"""Computes the loss of a model on plain text, in windows that do not overlap."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.evaluate.score import Pair, score
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """The summed loss of each window in nats, and the number of predicted tokens in all windows."""

    windows: tuple[float, ...]
    tokens: int

    @property
    def loss(self) -> float:
        """Returns the mean loss in nats per predicted token."""
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
    """Cuts a text into complete windows, and sums the loss of each window.

    The first token of a window is given, not predicted. An incomplete window at the end of the text
    is ignored.

    Args:
      model: model with or without adapters.
      ids: token ids of the text.
      window: number of tokens in a window.
      batch: number of windows in a batch.
      dtype: compute dtype.

    Raises:
      UserError: the text is shorter than one window.
    """
    count = len(ids) // window
    if not count:
        raise UserError(
            f"the text has {len(ids)} tokens, less than one window of {window}; give more text, or "
            "a smaller window"
        )
    rows = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    pairs = [Pair(row[:1], row[1:]) for row in rows.tolist()]
    scores = score(model, pairs, dtype=dtype, pad_id=0, batch_size=batch, max_length=window)
    return TextLoss(tuple(-s.log_likelihood for s in scores), count * (window - 1))
