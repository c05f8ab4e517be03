"""Decides by measured times for which numbers of rows of x a fused kernel is picked."""

import itertools
from collections.abc import Iterable, Mapping

from qlora_jax.gpu.case import DECODE_FIRST, GpuProduct
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.measured import GpuReport
from qlora_jax.kernels.select import EVERY, FUSED, FUSED_ROWS
from qlora_jax.kernels.target import Capability


def fused_rows(implementation: str, times: Mapping[GpuProduct, float]) -> tuple[range, ...]:
    """Returns the rows of x for which a fused implementation was measured no slower than xla.

    At a measured number of rows, the implementation must be no slower for every shape, direction
    and dtype that it supports and that xla was measured with; a missing time counts as slower.
    Another number of rows has the verdict of the next lower measured number or, below the least
    measured number, the verdict of the least.

    Returns:
      Ranges as in `select.FUSED_ROWS`; () if nothing can be compared.
    """
    verdicts: dict[int, bool] = {}
    for case, limit in times.items():
        if case.implementation != DECODE_FIRST or case.dtype not in FUSED[implementation].dtypes:
            continue
        fused = times.get(case._replace(implementation=implementation))
        better = fused is not None and fused <= limit
        verdicts[case.rows] = verdicts.get(case.rows, True) and better
    measured = sorted(verdicts)
    found: list[range] = []
    for start, stop in itertools.pairwise([0, *measured[1:], EVERY] if measured else []):
        if not verdicts[start or measured[0]]:
            continue
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, stop))
    return tuple(found)


def table(known: Iterable[GpuReport]) -> dict[str, dict[Capability, tuple[range, ...]]]:
    """Returns `select.FUSED_ROWS` with the rows of measured GPUs in place of modelled ones.

    The times of all GPUs with one capability are combined. A capability with the same ranges as the
    capability before it is left out, as in `select.FUSED_ROWS`.
    """
    times: dict[Capability, dict[GpuProduct, float]] = {}
    for report in known:
        if any(case.implementation == DECODE_FIRST for case in report.times):
            times.setdefault(report.capability, {}).update(report.times)
    every = sorted({read_gpu(gpu).capability for gpu in GPUS} | times.keys())
    made: dict[str, dict[Capability, tuple[range, ...]]] = {}
    for name, modelled in FUSED_ROWS.items():
        rows: dict[Capability, tuple[range, ...]] = {}
        last: tuple[range, ...] = ()
        for capability in every:
            if capability in times:
                now = fused_rows(name, times[capability])
            else:
                before = [c for c in modelled if c <= capability]
                now = modelled[max(before)] if before else ()
            if now != last:
                rows[capability] = last = now
        made[name] = rows
    return made
