"""Checks the kernels that `matmul` picks against measured times, or modelled ones if none exist."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from qlora_jax.gpu import kernel_rows, measured
from qlora_jax.gpu.case import GpuProduct
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.measured import GpuReport
from qlora_jax.kernels import select
from qlora_jax.kernels.select import EVERY
from qlora_jax.kernels.target import Capability, compiling_for

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = json.loads((DOCS / "gpu.json").read_text("utf-8"))
REPORTS = measured.reports(DOCS / "results" / "gpu")


def slower(times: Mapping[GpuProduct, float], capability: Capability) -> list[GpuProduct]:
    """Returns the products for which the picked kernel is slower than decoding first."""
    found = []
    for case, limit in times.items():
        if case.implementation == "xla":
            with compiling_for(capability):
                picked = case._replace(implementation=select.pick(case.rows, case.dtype))
            if times.get(picked, float("inf")) > limit:
                found.append(picked)
    return found


@pytest.mark.parametrize("gpu", sorted(set(GPUS) - {report.gpu for report in REPORTS}))
def test_nothing_is_picked_that_is_modelled_to_be_slower(gpu: str) -> None:
    times = {
        GpuProduct(*(record[field] for field in GpuProduct._fields)): record["seconds"]["total"]
        for record in RECORDS
        if record["gpu"] == gpu and record["error"] is None
    }
    assert sum(case.implementation == "xla" for case in times) == 20
    assert slower(times, read_gpu(gpu).capability) == []


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.device)
def test_nothing_is_picked_that_was_measured_to_be_slower(report: GpuReport) -> None:
    assert slower(report.times, report.capability) == []


def test_the_rows_that_follow_from_a_report_pass(write_report, monkeypatch) -> None:
    monkeypatch.setattr(select, "usable", lambda capability, dtype: ["mosaic"])
    monkeypatch.setattr(select, "FUSED_ROWS", {"mosaic": {(8, 0): (range(EVERY),)}, "triton": {}})
    took = {("xla", 1): 20, ("mosaic", 1): 21, ("xla", 16): 20, ("mosaic", 16): 7}
    report = GpuReport(write_report({**took, ("xla", 512): 30, ("mosaic", 512): 50}))
    assert {case.rows for case in slower(report.times, report.capability)} == {1, 512}
    monkeypatch.setattr(select, "FUSED_ROWS", kernel_rows.table([report]))
    assert slower(report.times, report.capability) == []
    with compiling_for(report.capability):
        assert [select.pick(m, "bfloat16") for m in (1, 16, 300, 512)] == [
            *("xla", "mosaic", "mosaic", "xla")
        ]
