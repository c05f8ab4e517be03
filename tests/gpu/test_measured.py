"""Tests times and kernel rows that follow from reports of `qlora-jax bench gpu` (made up)."""

import json
import math
from pathlib import Path

import pytest

from qlora_jax.gpu import kernel_rows, roofline
from qlora_jax.gpu.case import GpuProduct, tile
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.kernel_rows import fused_rows
from qlora_jax.gpu.measured import GpuReport, reports, target
from qlora_jax.gpu.roofline import RATES, Ceilings, KernelTime
from qlora_jax.gpu.times import seconds_at
from qlora_jax.kernels.select import EVERY, FUSED_ROWS
from qlora_jax.runtime.errors import UserError

RECORDS = json.loads((Path(__file__).parents[2] / "docs" / "gpu.json").read_text("utf-8"))
TIMES = {("xla", 1): 20, ("mosaic", 1): 5.5, ("xla", 512): 30, ("mosaic", 512): 31}


def test_what_a_report_says(write_report) -> None:
    report = GpuReport(write_report(TIMES))
    assert (report.device, report.gpu) == ("NVIDIA H100 80GB HBM3", "h100")
    assert report.capability == (9, 0)
    assert report.ceilings("bfloat16") == Ceilings(3e12, 800.5e12)
    assert report.ceilings("float16") is None
    case = GpuProduct("h100", "mosaic", 1, 4096, 4096, "bfloat16", "forward")
    assert report.times[case] == pytest.approx(5.5e-6)
    assert len(report.times) == 4


def test_a_device_has_a_target_only_by_its_whole_name(write_report) -> None:
    assert {gpu: target(read_gpu(gpu).name) for gpu in GPUS} == {gpu: gpu for gpu in GPUS}
    assert target(" nvidia h100 80gb hbm3") == "h100"
    for other in ("NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "H100", ""):
        assert target(other) is None
    report = GpuReport(write_report(TIMES, device="NVIDIA H200"))
    assert report.gpu is None
    assert {case.gpu for case in report.times} == {"NVIDIA H200"}


def broken(key: str, value: object) -> dict[str, object]:
    figure = {"part": "ceilings", "field": "copy", "unit": "GB/s", "value": 1.0}
    return figure | {key: value}


TIME = {"part": "times", "field": "time", "unit": "us", "value": 1.0, "implementation": "xla"}


@pytest.mark.parametrize(
    ("figure", "key"),
    [
        (broken("value", "fast"), "figures.3.value"),
        (broken("value", 0), "figures.3.value"),
        (broken("value", math.inf), "figures.3.value"),
        (broken("value", True), "figures.3.value"),
        (broken("unit", "MB/s"), "figures.3.unit"),
        (broken("field", "matmul float16"), "figures.3.unit"),
        (TIME, "figures.3.direction"),
        (TIME | {"direction": "forward", "rows": 1.5, "k": 64, "n": 64, "dtype": "x"}, "3.rows"),
    ],
)
def test_a_damaged_figure(write_report, figure, key) -> None:
    path = write_report({}, figure)
    with pytest.raises(UserError, match=rf"^{path}: \S*{key}: .*; measure again$"):
        GpuReport(path)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"schema": 2}, "schema"),
        ({"figures": None}, "figures"),
        ({"figures": [3]}, "figures.0"),
        ({"capability": "ninety"}, "capability"),
        ({"capability": "8.0"}, "capability"),
    ],
)
def test_a_damaged_file(write_report, keys, key) -> None:
    path = write_report(**keys)
    with pytest.raises(UserError, match=rf"^{path}: {key}: "):
        GpuReport(path)


def test_a_product_that_is_there_twice(write_report) -> None:
    times = {"part": "times", "field": "time", "unit": "us", "value": 5, "implementation": "xla"}
    twice = times | {"direction": "forward", "rows": 1, "k": 4096, "n": 4096, "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"figures\.7: a second time of \('xla', 1, 4096"):
        GpuReport(write_report(TIMES, twice))


def test_a_folder_of_reports(write_report, tmp_path) -> None:
    assert reports(tmp_path / "none") == []
    path = write_report(TIMES)
    write_report(TIMES, device="NVIDIA H200")
    assert [report.gpu for report in reports(path.parent)] == ["h100", None]
    path.with_name("z.json").write_text(path.read_text())
    with pytest.raises(UserError, match=rf"z\.json: device: NVIDIA H100.*, as in {path.name}"):
        reports(path.parent)
    path.with_name("z.json").write_text("{")
    with pytest.raises(UserError, match=r"z\.json: not JSON"):
        reports(path.parent)


def test_at_the_data_sheets_rates_nothing_changes() -> None:
    for record in RECORDS:
        found = seconds_at(record, roofline.data_sheet(record["gpu"]))
        assert found == pytest.approx(record["seconds"]), record["gpu"]


def test_a_fused_kernel_at_other_rates_from_its_loops_clocks() -> None:
    """The reference is the sum from launch, clocks and flop; HMMA keeps its share of the peak."""
    for record in RECORDS:
        if record["implementation"] == "xla":
            continue
        case = GpuProduct(*(record[field] for field in GpuProduct._fields))
        gpu, rates = read_gpu(case.gpu), RATES[case.gpu]
        [kernel] = [x for x in record["kernels"] if x["main_loop_tensor_flop"]]
        m, o = tile(case)
        flop = 2 * math.ceil(case.rows / m) * m * math.ceil(case.outer / o) * o * case.inner
        blocks, clocks = kernel["launch"]["blocks"], dict(kernel["main_loop_clocks"])
        each = flop / blocks / kernel["main_loop_tensor_flop"] / 4 * math.ceil(blocks / gpu.cores)
        half = rates.tensor * rates.clock * gpu.cores / 2
        found = seconds_at(record, Ceilings(1e12, half))
        assert found["bytes"] == pytest.approx(record["moved_bytes"] / 1e12)
        assert found["tensor"] == pytest.approx(2 * clocks.pop("tensor") * each / rates.clock)
        assert found["issue"] == pytest.approx(max(clocks.values()) * each / rates.clock)
        assert found["total"] == max(found[name] for name in KernelTime._fields)


@pytest.mark.parametrize("gpu", ["a100", "a6000", "h100", "rtx4090"])
def test_decode_first_at_other_rates(gpu) -> None:
    """Decoding is bound by bytes; the product is bound by the larger of bytes and flop."""
    rates = Ceilings(read_gpu(gpu).bandwidth / 2, 1e14)
    for record in RECORDS:
        if record["gpu"] != gpu or record["implementation"] != "xla":
            continue
        m, k, n = record["rows"], record["k"], record["n"]
        found, before = seconds_at(record, rates), record["seconds"]
        if m >= 512:
            operands = 2 * (m * k + k * n + m * n) / rates.bandwidth
            flop = 2 * m * k * n / rates.tensor
            assert found["product"] == pytest.approx(max(operands, flop), rel=1e-3)
        elif m == 1:
            assert found["product"] == pytest.approx(2 * before["product"], rel=0.01)
        assert found["decode"] == pytest.approx(2 * before["decode"], rel=0.02)
        assert found["total"] == pytest.approx(found["decode"] + found["product"])


def times(**by_rows: dict[int, float]) -> dict[GpuProduct, float]:
    return {
        GpuProduct("h100", name, rows, 4096, 4096, "bfloat16", "forward"): value
        for name, values in by_rows.items()
        for rows, value in values.items()
    }


@pytest.mark.parametrize(
    ("mosaic", "expected"),
    [
        ({1: 9, 16: 9, 512: 9}, (range(EVERY),)),
        ({1: 9, 16: 10, 512: 11}, (range(512),)),
        ({1: 9, 16: 11, 512: 9}, (range(16), range(512, EVERY))),
        ({1: 11, 16: 9, 512: 11}, (range(16, 512),)),
        ({1: 11, 16: 11, 512: 11}, ()),
        ({1: 9, 16: 9}, (range(512),)),
        ({}, ()),
    ],
)
def test_rows_between_go_with_the_lower_neighbour(mosaic, expected) -> None:
    xla = dict.fromkeys((1, 16, 512), 10)
    assert fused_rows("mosaic", times(xla=xla, mosaic=mosaic)) == expected


def test_one_slower_product_decides() -> None:
    fast = times(xla={1: 10, 16: 10}, mosaic={1: 9, 16: 9})
    other = {case._replace(direction="backward"): value for case, value in fast.items()}
    slow = GpuProduct("h100", "mosaic", 16, 4096, 4096, "bfloat16", "backward")
    assert fused_rows("mosaic", fast | other) == (range(EVERY),)
    assert fused_rows("mosaic", fast | other | {slow: 10.1}) == (range(16),)
    # Mosaic does not support float32, so a float32 time matters only for Triton.
    wide = {case._replace(dtype="float32"): 1.0 for case in times(xla={1: 1, 16: 1})}
    assert fused_rows("mosaic", fast | wide) == (range(EVERY),)
    assert fused_rows("triton", fast | wide) == ()
    assert fused_rows("mosaic", {}) == ()


def test_the_table_keeps_what_was_not_measured(write_report) -> None:
    assert kernel_rows.table([]) == FUSED_ROWS
    assert kernel_rows.table([GpuReport(write_report())]) == FUSED_ROWS
    path = write_report(TIMES)
    made = kernel_rows.table([GpuReport(path)])
    assert made["mosaic"] == {**FUSED_ROWS["mosaic"], (9, 0): (range(512),)}
    assert made["triton"] == {}
    # Two GPUs with one capability share a row: a kernel must be fast on both.
    slow = {**TIMES, ("mosaic", 1): 21, ("mosaic", 512): 1}
    both = [GpuReport(path), GpuReport(write_report(slow, device="NVIDIA H200"))]
    assert kernel_rows.table(both)["mosaic"][9, 0] == ()
