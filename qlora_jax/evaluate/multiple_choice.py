"""Computes multiple-choice accuracy in MMLU's format, with or without solved examples.

The prompts follow MMLU's authors (Hendrycks et al. 2021, section 3 and their evaluation code): a
line that names the subject, then the examples and the question, each with lettered choices and
`Answer:`. The model's answer is the letter with the largest log-likelihood.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp

from qlora_jax.evaluate.questions import LETTERS, Question
from qlora_jax.evaluate.score import Pair, encode_pair, score
from qlora_jax.models.decoder import Decoder
from qlora_jax.text.tokenizer import Tokenizer

Z95 = 1.959963984540054
"""The standard normal quantile at 0.975."""

By = Literal["letter", "text"]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy on `count` questions; `low` and `high` bound its 95% Wilson interval."""

    count: int
    correct: int
    accuracy: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a model on a set of questions.

    Attributes:
      metric: name of the figure `total`: data set, split and `accuracy`, as in mmlu/test/accuracy.
      shots: largest number of solved examples before each question.
      by: scoring: `letter` compares the letters, `text` compares the choices' words, with
        log-likelihood divided by length.
      subjects: accuracy of each subject.
      total: accuracy over all questions (micro average).
      macro: mean of the subjects' accuracies (macro average).
      shortened: number of questions with fewer examples, because the model has too few positions.
      cut: number of questions whose beginning was cut, because the model has too few positions.
    """

    metric: str
    shots: int
    by: By
    subjects: Mapping[str, Accuracy]
    total: Accuracy
    macro: float
    shortened: int
    cut: int


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    examples: Mapping[str, Sequence[Question]],
    *,
    metric: str,
    shots: int,
    by: By,
    dtype: jnp.dtype,
    batch_size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Result:
    """Answers every question with the likeliest choice, or with the first of equal choices.

    Args:
      model: model with or without adapters.
      tokenizer: tokenizer of the model.
      questions: questions to answer.
      examples: solved questions by subject; the first `shots` precede each question.
      metric: name of the result.
      shots: largest number of examples before a question; fewer if there are fewer, or if the
        model has too few positions.
      by: `letter` compares ` A`, ` B`, ...; `text` compares the words of each choice after a prompt
        without lettered choices, with log-likelihood divided by the number of characters.
      dtype: compute dtype.
      batch_size: rows in a batch.
      advance: function called with the number of newly scored choices.
    """
    limit = model.config.longest
    pairs: list[Pair] = []
    shortened = cut = 0
    for question in questions:
        solved = list(examples.get(question.subject, ()))[:shots]
        wanted = len(solved)
        own = _pairs(question, solved, tokenizer, by)
        while solved and _longest(own) > limit:
            solved.pop()
            own = _pairs(question, solved, tokenizer, by)
        shortened += len(solved) < wanted
        cut += _longest(own) > limit
        pairs += own
    scores = score(
        model,
        pairs,
        dtype=dtype,
        pad_id=tokenizer.pad_id,
        batch_size=batch_size,
        advance=advance,
    )
    found = iter(scores)
    right: dict[str, list[bool]] = {}
    for question in questions:
        values = [next(found).log_likelihood for _ in question.choices]
        if by == "text":
            values = [v / len(choice) for v, choice in zip(values, question.choices)]
        right.setdefault(question.subject, []).append(_best(values) == question.answer)
    subjects = {name: accuracy(sum(r), len(r)) for name, r in sorted(right.items())}
    return Result(
        metric=metric,
        shots=shots,
        by=by,
        subjects=subjects,
        total=accuracy(sum(map(sum, right.values())), len(questions)),
        macro=sum(a.accuracy for a in subjects.values()) / len(subjects),
        shortened=shortened,
        cut=cut,
    )


def accuracy(correct: int, count: int) -> Accuracy:
    """Returns the accuracy with its Wilson interval."""
    low, high = wilson(correct, count)
    return Accuracy(count, correct, correct / count, low, high)


def wilson(correct: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Returns Wilson's interval of a proportion: (p - p̂)² <= z² p (1 - p) / n (Wilson 1927)."""
    p = correct / count
    middle = p + z**2 / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # the interval contains p̂; min and max keep this true in spite of rounding
    return min(p, max(0.0, (middle - half) / scale)), max(p, min(1.0, (middle + half) / scale))


def prompt(question: Question, solved: Sequence[Question], by: By) -> str:
    """Returns the prompt, up to and including the question's `Answer:`."""
    subject = question.subject.replace("_", " ").strip()
    about = f" about {subject}" if subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    examples = [f"{_asked(e, by)}{_answers(e, by)[e.answer]}\n\n" for e in solved]
    return head + "".join(examples) + _asked(question, by)


def _asked(question: Question, by: By) -> str:
    choices = [f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices)]
    return "\n".join([question.question, *(choices if by == "letter" else ()), "Answer:"])


def _answers(question: Question, by: By) -> list[str]:
    if by == "text":
        return [f" {choice}" for choice in question.choices]
    return [f" {letter}" for letter in LETTERS[: len(question.choices)]]


def _pairs(question: Question, solved: Sequence[Question], text: Tokenizer, by: By) -> list[Pair]:
    context = prompt(question, solved, by)
    return [encode_pair(text, context, answer) for answer in _answers(question, by)]


def _longest(pairs: Sequence[Pair]) -> int:
    return max(len(p.context) + len(p.continuation) - 1 for p in pairs)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
