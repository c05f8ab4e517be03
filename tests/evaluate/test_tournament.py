import numpy as np
import pytest

from qlora_jax.evaluate.tournament import K, Match, elo, first_place_bias, play


def longer(prompt: str, first: str, second: str) -> float:
    return 0.5 + 0.5 * np.sign(len(first) - len(second))


def test_every_pair_meets_in_both_orders():
    answers = {"a": ["xx", "y"], "b": ["x", "y"], "c": ["xxx", ""]}
    matches = play(["p", "q"], answers, longer)
    assert len(matches) == 2 * 3 * 2
    assert Match(0, "a", "b", 1.0) in matches
    assert Match(0, "b", "a", 0.0) in matches
    assert Match(1, "a", "b", 0.5) in matches
    assert first_place_bias(matches) == 0


def test_a_judge_that_favours_a_place_is_found_and_cancels():
    answers = {"a": ["x"] * 5, "b": ["x"] * 5}
    matches = play(["p"] * 5, answers, lambda prompt, first, second: 1.0)
    assert first_place_bias(matches) == 0.5
    a, b = elo(matches, orderings=500)
    assert a.elo == pytest.approx(b.elo, abs=3)


def test_one_game_is_elos_formula():
    winner, loser = elo([Match(0, "a", "b", 1.0)], orderings=3)
    assert (winner.player, winner.elo) == ("a", 1000 + K / 2)
    assert (loser.player, loser.elo) == ("b", 1000 - K / 2)


def test_many_games_approach_the_rating_that_the_win_rate_means():
    # at a constant win rate p, the rating gap settles where the expected score equals p
    random = np.random.default_rng(0)
    matches = [Match(i, "a", "b", float(random.random() < 0.75)) for i in range(400)]
    share = np.mean([m.score for m in matches])
    a, b = elo(matches, orderings=300)
    assert a.elo - b.elo == pytest.approx(400 * np.log10(share / (1 - share)), abs=25)
    assert a.low < a.elo < a.high
    assert a.elo + b.elo == pytest.approx(2000)


def test_ratings_are_ordered_and_reproducible():
    answers = {"a": ["x"] * 6, "b": ["xx"] * 6, "c": ["xxx"] * 6}
    matches = play(["p"] * 6, answers, longer)
    rows = elo(matches, orderings=200, seed=3)
    assert [row.player for row in rows] == ["c", "b", "a"]
    assert rows == elo(matches, orderings=200, seed=3)
