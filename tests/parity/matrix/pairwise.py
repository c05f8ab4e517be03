"""A sample of the combinations of some options in which pairs of choices meet early."""

import itertools
import random
from collections.abc import Collection, Mapping, Sequence

TRIES = 40
"""Random rows among which the best is taken."""

Row = dict[str, str]
Rule = Mapping[str, Collection[str]]
"""Axes to choices of which no row has one for each."""


def pairwise(
    axes: Mapping[str, Sequence[str]], most: int, seed: int, rules: Sequence[Rule] = ()
) -> list[Row]:
    """Returns rows, each with one choice of every axis; the first has every axis' first choice.

    A row is the one, of some random ones, with the most choices that no row before has, and among
    those the one with the most such pairs of choices. There are no more rows once every pair of
    choices is in one.

    Args:
      axes: name to its choices.
      most: number of rows, at most.
      seed: another gives another sample.
      rules: what no row may have together.
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
    """Whether a row, or a part of one, has together what a rule forbids."""
    return any(all(row.get(axis) in choices for axis, choices in rule.items()) for rule in rules)


def sample(
    axes: Mapping[str, Sequence[str]],
    apart: Collection[tuple[str, str]],
    most: int,
    seed: int,
    rules: Sequence[Rule],
) -> list[Row]:
    """Returns `pairwise` rows without the choices set apart, and one row for each of these.

    Args:
      axes: name to its choices; the first is the usual one.
      apart: axis and choice, of any axes.
      most: number of pairwise rows, at most.
      seed: of the sample.
      rules: what no pairwise row may have together.
    """
    together = {
        axis: [choice for choice in choices if (axis, choice) not in apart]
        for axis, choices in axes.items()
    }
    rows = pairwise(together, most, seed, rules)
    return rows + [row for row in alone(axes) if any(pair in apart for pair in row.items())]


def alone(axes: Mapping[str, Sequence[str]]) -> list[Row]:
    """Returns the usual row, and for every other choice the row where it is the only change."""
    usual = {axis: choices[0] for axis, choices in axes.items()}
    return [usual, *(usual | {a: c} for a, choices in axes.items() for c in choices[1:])]


def describe(row: Row, usual: Row) -> str:
    """Tells what of a row is not the usual."""
    return "; ".join(f"{k} {v}" for k, v in row.items() if usual[k] != v) or "as usual"


def pairs_of(row: Row) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs of choices that meet in a row."""
    return set(itertools.combinations(row.items(), 2))
