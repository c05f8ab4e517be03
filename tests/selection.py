"""Marks the cases of a parametrized test that run only with the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *often: Any) -> list[Any]:
    """Returns cases as parameters of a test; all except `often` run only with the slow tests.

    Args:
      cases: values of a parameter, or tuples of the values of several.
      often: the cases that run by default.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in often else pytest.mark.slow,
        )
        for case in cases
    ]
