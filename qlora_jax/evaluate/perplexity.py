"""Loss of a model on plain text, in windows that do not overlap."""

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
        raise UserError(
            f"the text has {len(ids)} tokens, less than one window of {window}; give more text, or "
            "a smaller window"
        )
    rows = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    pairs = [Pair(row[:1], row[1:]) for row in rows.tolist()]
    scores = score(model, pairs, dtype=dtype, pad_id=0, batch_size=batch, max_length=window)
    return TextLoss(tuple(-s.log_likelihood for s in scores), count * (window - 1))
