"""Judges for `tournament.play`: the likelihood under a model, or a chat model at an endpoint."""

import math
import re
from collections.abc import Callable

from qlora_jax.evaluate.tournament import Judge
from qlora_jax.runtime.errors import UserError

INSTRUCTION = (
    "You compare two answers to a request. Judge whether they are helpful, right and clear; their "
    "order and length are no merit. Give one line with your reason, then a last line that holds "
    "only [A], [B] or [equal]."
)

VERDICTS = {"A": 1.0, "B": 0.0, "equal": 0.5}


def by_likelihood(score: Callable[[str, str], tuple[float, int]], tie: float = 0.0) -> Judge:
    """Returns a judge that prefers the answer with the larger log-likelihood per token; offline.

    Args:
      score: function (prompt, answer) -> (log-likelihood in nats, number of tokens) under a
        reference model. There are two useful choices. The likelihood of a correct answer that
        follows this answer measures the answer's worth. The likelihood of the answer itself only
        measures closeness to the reference model, so the reference model's answers win.
      tie: largest difference, in nats per token, at which two answers are equal.
    """

    def per_token(prompt: str, answer: str) -> float:
        total, tokens = score(prompt, answer)
        return total / tokens if tokens else -math.inf

    def judge(prompt: str, first: str, second: str) -> float:
        a, b = per_token(prompt, first), per_token(prompt, second)
        if a == b or abs(a - b) <= tie:
            return 0.5
        return 1.0 if a > b else 0.0

    return judge


def by_endpoint(url: str, model: str, api_key: str = "none", timeout: float = 60.0) -> Judge:
    """Returns a judge that asks a chat model at an OpenAI-compatible endpoint, at temperature 0.

    Args:
      url: address of the endpoint, such as http://127.0.0.1:8000/v1.
      model: name of the chat model at the endpoint.
      api_key: key of the endpoint, if it needs one.
      timeout: time limit of one judgement, in seconds.

    Raises:
      UserError: the package openai is not installed. The returned judge raises it if the endpoint
        fails, or if the reply names no winner.
    """
    try:
        import openai
    except ImportError:
        raise UserError(
            "a judge behind an endpoint needs the package openai: pip install openai"
        ) from None
    client = openai.OpenAI(base_url=url, api_key=api_key, timeout=timeout)

    def judge(prompt: str, first: str, second: str) -> float:
        question = f"Request:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
        try:
            reply = client.chat.completions.create(
                model=model,
                temperature=0,
                messages=[
                    {"role": "system", "content": INSTRUCTION},
                    {"role": "user", "content": question},
                ],
            )
        except openai.OpenAIError as e:
            raise UserError(
                f"{url}: the judge {model} failed: {e}; see whether it is served there"
            ) from None
        return verdict(reply.choices[0].message.content or "")

    return judge


def verdict(reply: str) -> float:
    """Returns the score in a judge's reply, from the last [A], [B] or [equal] in it.

    Raises:
      UserError: the reply holds none of the three.
    """
    found = re.findall(r"\[(A|B|equal)\]", reply)
    if not found:
        raise UserError(
            f"the judge's reply holds none of [A], [B], [equal]: {reply[-80:]!r}; give a judge "
            "that follows the instruction"
        )
    return VERDICTS[found[-1]]
