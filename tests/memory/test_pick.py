"""What `matmul` picks for a GPU, against the modelled times that docs/gpu.md shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.kernels import fused
from qlora_jax.memory.compile import GPUS, read_gpu

FIGURES = Path(__file__).parents[2] / "docs" / "gpu.json"


@pytest.mark.skipif(
    not FIGURES.exists(), reason="docs/gpu.json is made by experiments/gpu_table.py"
)
@pytest.mark.parametrize("gpu", GPUS)
def test_nothing_slower_than_decoding_first_is_picked(gpu: str) -> None:
    by_product: dict[tuple, dict[str, Any]] = {}
    for record in json.loads(FIGURES.read_text("utf-8")):
        if record["gpu"] == gpu:
            product = tuple(record[key] for key in ("rows", "k", "n", "direction", "dtype"))
            by_product.setdefault(product, {})[record["implementation"]] = record
    assert len(by_product) == 20
    for (rows, *_, dtype), records in by_product.items():
        with fused.compiling_for(read_gpu(gpu).capability):
            picked = fused.pick(rows, dtype)
        assert records[picked]["error"] is None
        limit = records["xla"]["seconds"]["total"]
        assert records[picked]["seconds"]["total"] <= limit, (gpu, rows, records[picked])
