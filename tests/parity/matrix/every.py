"""Lists all cases of the matrix by group."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from matrix import adapter_options, adapters, models, options, quantized
from matrix.judge import Outcome
from matrix.pairwise import alone, sample

MODELS, ADAPTERS, QUANTIZED = 12, 12, 10
"""Numbers of pairwise cases: for each family, for each adapter base, for 4-bit checkpoints."""
SEED = 1

Group = Callable[[], Iterator[Outcome]]


def sampled(seed: int = SEED, times: int = 1) -> Mapping[str, Group]:
    """Returns the groups of a sample of cases; calling a group runs it.

    Args:
      seed: seed of the sample and of the weights.
      times: factor on the number of pairwise cases.
    """
    groups: dict[str, Group] = {}
    for family in options.AXES:
        axes = models.axes(family)
        rows = sample(axes, options.APART, times * MODELS, seed, options.RULES)
        groups[family] = partial(models.run_models, family, rows, seed)
    for i, base in enumerate(adapter_options.BASES):
        # A refusal that does not depend on the base counts once: only the first base has it.
        apart, rules = adapter_options.APART, adapter_options.RULES
        rows = sample(adapters.axes(), apart, times * ADAPTERS, seed + i, rules)
        if base == next(iter(adapter_options.BASES)):
            usual = {axis: next(iter(choices)) for axis, choices in adapters.axes().items()}
            rows += [usual | pair for pair in adapter_options.TOGETHER]
        else:
            rows = [row for row in rows if not apart & row.items()]
        groups[f"adapters of {base}"] = partial(adapters.run_adapters, base, rows, seed)
    rows = sample(quantized.AXES, {("kind", quantized.INT8)}, times * QUANTIZED, seed, ())
    return groups | apart_from_options(rows, seed)


def one_by_one(seed: int = SEED) -> Mapping[str, Group]:
    """Returns the groups in which each case changes one choice of the default case."""
    groups: dict[str, Group] = {
        family: partial(models.run_models, family, alone(models.axes(family)), seed)
        for family in options.AXES
    }
    for base in adapter_options.BASES:
        rows = alone(adapters.axes())
        groups[f"adapters of {base}"] = partial(adapters.run_adapters, base, rows, seed)
    return groups | apart_from_options(alone(quantized.AXES), seed)


def apart_from_options(rows: list[dict[str, str]], seed: int) -> dict[str, Group]:
    """Returns the groups outside the options of families and adapters."""
    return {
        "4 bits": partial(quantized.run_quantized, rows, seed),
        "settings left over": partial(quantized.run_left_over, seed),
        "functions": partial(models.run_functions, seed),
    }
