"""Estimates the time and memory of cells: means of docs/results/sweeps, on 2 CPU cores."""

from collections.abc import Callable, Mapping

from qlora_jax.sweep import Cell, Estimate


def by(axis: str, seconds: Mapping[str, float], gib: float) -> Callable[[Cell], Estimate | None]:
    """Returns a function that estimates a cell by its value on an axis; None if unknown."""

    def estimate(cell: Cell) -> Estimate | None:
        known = seconds.get(cell[axis])
        return None if known is None else Estimate(known, int(gib * 2**30))

    return estimate
