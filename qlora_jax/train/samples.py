"""Answers held-out prompts with the model, before and after training."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from qlora_jax.config import Config
from qlora_jax.data.prompts import SamplePrompt
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.generate import generate
from qlora_jax.runtime.display import progress
from qlora_jax.text.tokenizer import Tokenizer


def answer(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[SamplePrompt],
    description: str,
    mesh: Mesh | None = None,
) -> list[str]:
    """Returns the model's greedy answers as text.

    Args:
      config: config of the run.
      model: model on one device, or split over a mesh.
      tokenizer: tokenizer of the model.
      questions: prompts to answer.
      description: text of the progress display.
      mesh: devices over which the weights are split; None for one device.
    """
    if not questions:
        return []
    with progress(description, len(questions)) as advance:
        rows = generate(
            model,
            [q.ids for q in questions],
            max_new_tokens=config.train.sample_tokens,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            dtype=jnp.dtype(config.model.compute_dtype),
            mesh=mesh,
        )
        advance(len(questions))
    return [tokenizer.decode(row) for row in rows]
