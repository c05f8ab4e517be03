"""Samples combinations of options so that every pair of choices soon occurs together."""

import itertools
import random
from collections.abc import Collection, Mapping, Sequence

TRIES = 40
"""Number of random rows from which the best one is taken."""

Row = dict[str, str]
Rule = Mapping[str, Collection[str]]
"""Axis to choices: a row breaks the rule if, for every axis, it has one of the choices."""


def pairwise(
    axes: Mapping[str, Sequence[str]], most: int, seed: int, rules: Sequence[Rule] = ()
) -> list[Row]:
    """Returns rows, each with one choice of every axis; the first has every axis' first choice.

    Each next row is the best of some random rows: the one with the most choices that no earlier row
    has, then the one with the most new pairs of choices. The sample ends when every allowed pair
    occurs in a row.

    Args:
      axes: name of each axis to its choices.
      most: largest number of rows.
      seed: seed of the sample.
      rules: combinations that no row may have.
    """
    source = random.Random(seed)
    rows = [{axis: choices[0] for axis, choices in axes.items()}]
    singles, pairs = set(rows[0].items()), pairs_of(rows[0])
    every = {
        pair
        for a, b in itertools.combinations(axes.items(), 2)
        for pair in itertools.product(*([(name, c) for c in choices] for name, choices in (a, b)))
        if not breaks(dict(pair), rules)
    }
    while len(rows) < most and (open_ := sorted(every - pairs)):
        tries: list[Row] = []
        while len(tries) < TRIES:
            row = {axis: source.choice(choices) for axis, choices in axes.items()}
            row |= dict(source.choice(open_))
            if not breaks(row, rules):
                tries.append(row)
        best = max(tries, key=lambda row: (len(row.items() - singles), len(pairs_of(row) - pairs)))
        rows.append(best)
        singles |= best.items()
        pairs |= pairs_of(best)
    return rows


def breaks(row: Row, rules: Sequence[Rule]) -> bool:
    """Tells whether a row, or a part of a row, has a combination that a rule forbids."""
    return any(all(row.get(axis) in choices for axis, choices in rule.items()) for rule in rules)


def sample(
    axes: Mapping[str, Sequence[str]],
    apart: Collection[tuple[str, str]],
    most: int,
    seed: int,
    rules: Sequence[Rule],
) -> list[Row]:
    """Returns `pairwise` rows without the choices in `apart`, then one row for each of those.

    Args:
      axes: name of each axis to its choices; the first is the default.
      apart: pairs of axis and choice that get a row alone.
      most: largest number of pairwise rows.
      seed: seed of the sample.
      rules: combinations that no pairwise row may have.
    """
    together = {
        axis: [choice for choice in choices if (axis, choice) not in apart]
        for axis, choices in axes.items()
    }
    rows = pairwise(together, most, seed, rules)
    return rows + [row for row in alone(axes) if any(pair in apart for pair in row.items())]


def alone(axes: Mapping[str, Sequence[str]]) -> list[Row]:
    """Returns the default row, then for every other choice the row with that one change."""
    usual = {axis: choices[0] for axis, choices in axes.items()}
    return [usual, *(usual | {a: c} for a, choices in axes.items() for c in choices[1:])]


def describe(row: Row, usual: Row) -> str:
    """Returns the choices of a row that differ from the defaults, as text."""
    return "; ".join(f"{k} {v}" for k, v in row.items() if usual[k] != v) or "as usual"


def pairs_of(row: Row) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Returns the pairs of choices that occur together in a row."""
    return set(itertools.combinations(row.items(), 2))
