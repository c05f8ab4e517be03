"""All cases, and a check whether this environment can build a case."""

import importlib.util

from experiments.other_models import artifex, gemma, maxtext, tunix
from experiments.other_models.cases import Case

CASES: tuple[Case, ...] = (*tunix.CASES, *gemma.CASES, *artifex.CASES, *maxtext.CASES)


def installed(case: Case) -> bool:
    """Returns whether a case's package is installed."""
    return importlib.util.find_spec(case.module) is not None
