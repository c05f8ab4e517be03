"""Multiple-choice accuracy in MMLU's format, with no or a few solved examples before the question.

Prompts are those of MMLU's authors (Hendrycks et al. 2021, section 3 and their evaluation code):
a line that names the subject, then the examples and the question, each with lettered choices and
`Answer:`. What is compared is the log-likelihood of the letters.
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
    """`correct` of `count`; `low` and `high` bound the accuracy's 95% Wilson interval."""

    count: int
    correct: int
    accuracy: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model scored.

    Attributes:
      metric: which figure `total` is: data set, split and `accuracy`, as in mmlu/test/accuracy.
      shots: solved examples before each question, at most.
      by: what is compared: letter, or text for the choice itself by its length.
      subjects: each subject's accuracy.
      total: of all questions alike (the micro average).
      macro: mean of the subjects' accuracies.
      shortened: questions with fewer examples than `shots`, for lack of positions.
      cut: questions that lost their beginning to the model's positions.
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
    """Answers every question by the likeliest choice; the first of equals.

    Args:
      model: with or without adapters.
      text: its tokenizer.
      questions: what is asked.
      examples: solved ones by subject; the first `shots` are put before each question.
      metric: the result's name.
      shots: as many examples as there are, up to this; fewer where positions do not suffice.
      by: letter compares ` A`, ` B`, ...; text compares each choice's own words after a prompt
        without lettered choices, the log-likelihood divided by their number of characters.
      dtype: compute dtype.
      batch_size: rows at once.
      advance: called with the number of choices scored.
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
    """A proportion and its interval."""
    low, high = wilson(correct, count)
    return Accuracy(count, correct, correct / count, low, high)


def wilson(correct: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for a proportion: where (p - p̂)² <= z² p (1 - p) / n (Wilson 1927)."""
    p = correct / count
    middle = p + z**2 / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # p̂ is within, also where rounding would have it a hair outside
    return min(p, max(0.0, (middle - half) / scale)), max(p, min(1.0, (middle + half) / scale))


def prompt(question: Question, solved: Sequence[Question], by: By) -> str:
    """The text up to and with the question's `Answer:`."""
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
