"""Answers prompts with a model; prompts and answers are text."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.data.prompts import ask
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.generate import generate
from qlora_jax.serve.base import PromptSettings
from qlora_jax.text.tokenizer import Tokenizer


def answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    asking: PromptSettings,
    dtype: DTypeLike,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    slots: Sequence[int] | None = None,
) -> list[str]:
    """Returns one answer per prompt, or one answer per prompt and adapter.

    Args:
      model: model with or without adapters.
      tokenizer: tokenizer of the model.
      prompts: prompts as the user wrote them.
      asking: settings that turn a prompt into model input.
      dtype: compute dtype.
      max_new_tokens: largest number of tokens of an answer.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: probability p; a token is drawn from the smallest set of most likely tokens whose
        probabilities add up to p or more.
      seed: seed of the random draws.
      slots: slots of the adapters in the model's banks. Each prompt is answered with each of them,
        and the answers to one prompt are adjacent. None for a model without banks.

    Raises:
      UserError: the chat template refuses a prompt, or `models.generate` fails.
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
