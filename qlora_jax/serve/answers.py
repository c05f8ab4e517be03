"""Answers prompts with a model: from text to text."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.data.prompts import ask
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.generate import generate
from qlora_jax.serve.base import Asking
from qlora_jax.text.tokenizer import Tokenizer


def answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    asking: Asking,
    dtype: DTypeLike,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    slots: Sequence[int] | None = None,
) -> list[str]:
    """Returns each prompt's answer, or its answers under several adapters.

    Args:
      model: with or without adapters.
      tokenizer: the model's.
      prompts: as people write them.
      asking: how they become what the model reads.
      dtype: of computation.
      max_new_tokens: most tokens of an answer.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draws from the fewest tokens that together have this probability.
      seed: of the draws.
      slots: the adapters in the model's banks that answer each prompt, one after another; None for
        a model without banks.

    Raises:
      UserError: the chat template refuses a prompt; or as `models.generate`.
    """
    questions = [
        ask(prompt, tokenizer, system_prompt=asking.system_prompt, template=asking.template)
        for prompt in prompts
    ]
    rows = generate(
        model,
        [question.ids for question in questions for _ in slots or [0]],
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        dtype=jnp.dtype(dtype),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        adapters=None if slots is None else [*slots] * len(questions),
    )
    return [tokenizer.decode(row) for row in rows]
