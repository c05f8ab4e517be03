"""Collects pairwise judgements of answers, and computes Elo ratings (QLoRA, section 5.2)."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Judge = Callable[[str, str, str], float]
"""Function (prompt, first answer, second answer) -> score of the first: 1 win, 0.5 tie, 0 loss."""

START = 1000.0
K = 32.0


class Match(NamedTuple):
    """One judgement; `score` is the score of the first player: 1, 0.5 or 0."""

    prompt: int
    first: str
    second: str
    score: float


@dataclasses.dataclass(frozen=True)
class Rating:
    """The Elo rating of a player: mean over orderings, and bounds of the 95% bootstrap interval."""

    player: str
    elo: float
    low: float
    high: float


def play(
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    judge: Judge,
    progress: Callable[[], None] = lambda: None,
) -> list[Match]:
    """Judges every pair of players on every prompt.

    Each pair is judged in both orders, because a judge may prefer the first or the second place.

    Args:
      prompts: prompts that the players answered.
      answers: map from a player to the player's answers, one for each prompt.
      judge: function that scores two answers.
      progress: function called once per judgement.
    """
    matches = []
    for i, prompt in enumerate(prompts):
        for first, second in itertools.permutations(answers, 2):
            score = judge(prompt, answers[first][i], answers[second][i])
            matches.append(Match(i, first, second, score))
            progress()
    return matches


def first_place_bias(matches: Sequence[Match]) -> float:
    """Returns the mean score of first answers minus 0.5; 0 for a judge that ignores the order."""
    return float(np.mean([match.score for match in matches]) - 0.5)


def elo(matches: Sequence[Match], *, orderings: int = 10_000, seed: int = 0) -> list[Rating]:
    """Computes Elo ratings, averaged over random orders of the games.

    An Elo rating depends on the order of the games. For the interval, each ordering uses a
    bootstrap sample of the prompts with all games of each sampled prompt. So the interval includes
    the variance of the prompts and of the order.

    Returns:
      The ratings, best player first.
    """
    players = sorted({match.first for match in matches} | {match.second for match in matches})
    index = {player: i for i, player in enumerate(players)}
    first = np.array([index[m.first] for m in matches])
    second = np.array([index[m.second] for m in matches])
    score = np.array([m.score for m in matches])
    by_prompt = [
        np.flatnonzero([m.prompt == p for m in matches])
        for p in sorted({m.prompt for m in matches})
    ]
    random = np.random.default_rng(seed)
    plain = np.stack([random.permutation(len(matches)) for _ in range(orderings)])
    ratings = _rate(first, second, score, plain, len(players)).mean(axis=0)
    sampled = _rate(first, second, score, _bootstrap(by_prompt, orderings, random), len(players))
    low, high = np.quantile(sampled, [0.025, 0.975], axis=0)
    rows = [Rating(p, float(ratings[i]), float(low[i]), float(high[i])) for p, i in index.items()]
    return sorted(rows, key=lambda row: -row.elo)


def _bootstrap(
    by_prompt: Sequence[np.ndarray], orderings: int, random: np.random.Generator
) -> np.ndarray:
    games = min(len(group) for group in by_prompt) * len(by_prompt)
    drawn = []
    for _ in range(orderings):
        chosen = random.integers(len(by_prompt), size=len(by_prompt))
        drawn.append(random.permutation(np.concatenate([by_prompt[c] for c in chosen]))[:games])
    return np.stack(drawn)


def _rate(
    first: np.ndarray, second: np.ndarray, score: np.ndarray, orders: np.ndarray, players: int
) -> np.ndarray:
    """Returns the final ratings [orderings, players] after the games in the order of each row."""
    ratings = np.full((len(orders), players), START)
    rows = np.arange(len(orders))
    for games in orders.T:
        a, b = first[games], second[games]
        expected = 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / 400))
        change = K * (score[games] - expected)
        ratings[rows, a] += change
        ratings[rows, b] -= change
    return ratings
