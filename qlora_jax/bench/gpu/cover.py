"""Chooses a small set of cases that contains each pair of values of two factors."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
TRIES = 30
"""Number of candidates for each case; the one that covers the most new pairs is taken."""


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Chooses cases so that each pair of values of two factors is in at least one case.

    The choice is greedy and the same at each call. A pair is left out if no allowed case for it is
    found.

    Args:
      factors: name to values, two factors or more.
      allowed: function that says whether a complete case may be taken.
    """
    source = random.Random(0)
    names = sorted(factors, key=lambda name: -len(factors[name]))
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    cases = []
    while left:
        seed = min(left, key=lambda pair: _order(pair, names, factors))
        found = [
            case
            for _ in range(TRIES)
            if allowed(case := _filled(dict(seed), names, factors, left, source))
        ]
        if not found:
            left.discard(seed)
            continue
        best = max(found, key=lambda case: len(left & _pairs(case, names)))
        left -= _pairs(best, names)
        cases.append({name: best[name] for name in factors})
    return cases


def _filled(
    case: Case, names: Sequence[str], factors: Mapping[str, Sequence[Any]], left: set, source: Any
) -> Case:
    """Returns the case with a value for each missing factor, chosen to add the most new pairs."""
    missing = [name for name in names if name not in case]
    source.shuffle(missing)
    for name in missing:
        values = list(factors[name])
        source.shuffle(values)
        case[name] = max(values, key=lambda v: len(left & _pairs(case | {name: v}, names)))
    return case


def _pairs(case: Case, names: Sequence[str]) -> set:
    present = [name for name in names if name in case]
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(present, 2)}


def _order(pair: Any, names: Sequence[str], factors: Mapping[str, Sequence[Any]]) -> tuple:
    return tuple((names.index(name), factors[name].index(value)) for name, value in pair)
