"""Fixtures: made-up reports of a GPU."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_report(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a report from microseconds by (implementation, rows).

    All times are for forward with W 4096 x 4096 in bfloat16. `more` are further figures. Keyword
    arguments replace keys of the file.
    """

    def write(times: Mapping[tuple[str, int], float] = {}, *more: Any, **keys: Any) -> Path:
        product = {"direction": "forward", "k": 4096, "n": 4096, "dtype": "bfloat16"}
        figures = [
            {"part": "ceilings", "field": "copy", "unit": "GB/s", "value": 3000},
            {"part": "ceilings", "field": "matmul bfloat16", "unit": "TFLOP/s", "value": 800.5},
            {"part": "load", "field": "anything", "unit": None, "value": "text"},
            *(
                {"part": "times", "field": "time", "unit": "us", "value": value}
                | {"implementation": name, "rows": rows}
                | product
                for (name, rows), value in times.items()
            ),
            *more,
        ]
        tree = {
            "schema": 1,
            "device": "NVIDIA H100 80GB HBM3",
            "capability": "9.0",
            "versions": {"jax": "0.11.2"},
            "figures": figures,
            "checks": [],
        } | keys
        path = tmp_path / "reports" / f"{tree['device'].replace(' ', '_')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(tree))
        return path

    return write
