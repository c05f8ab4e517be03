"""Judges for `tournament.play`: a model's likelihood, or a chat model behind an endpoint."""

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
    """Prefers the answer of the larger log-likelihood per token by a reference model; offline.

    Args:
      score: (prompt, answer) to a log-likelihood in nats and its number of tokens. That of a right
        answer which follows this one says what it is worth; that of the answer itself says how
        close it is to the reference model, whose own answers win.
      tie: nats per token within which two answers are equal.
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
    """Asks a chat model behind an OpenAI-compatible endpoint, at temperature 0.

    Args:
      url: such as http://127.0.0.1:8000/v1.
      model: its name there.
      api_key: where one is needed.
      timeout: seconds for one judgement.

    Raises:
      UserError: the package openai is not installed; from the judge, the endpoint failed or its
        answer names no winner.
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
    """The score in a judge's reply: the last of [A], [B] and [equal].

    Raises:
      UserError: it holds none of them.
    """
    found = re.findall(r"\[(A|B|equal)\]", reply)
    if not found:
        raise UserError(
            f"the judge's reply holds none of [A], [B], [equal]: {reply[-80:]!r}; give a judge "
            "that follows the instruction"
        )
    return VERDICTS[found[-1]]
