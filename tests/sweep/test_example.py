"""Tests the example of docs/experiments.md: the page shows it, it runs, a metric is one entry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ranks.py"
FIRST_LINE = "METRICS: Mapping[str, Metric[Any]] = {\n"


@pytest.fixture
def page(
    run_cli: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path
) -> Callable[[Path], str]:
    """Returns a function that runs an experiment file on the tiny model and returns its page."""

    def run(path: Path) -> str:
        config = write_config(tmp_path, train__steps=2, train__eval_rows=4)
        settings = ("--set", f"config={config}", "--set", "rank=2,4", "--seeds", "0,1")
        ended = run_cli("sweep", path, *settings, "--out", tmp_path / "out")
        assert ended.code == 0, ended.err
        assert "4 done; results:" in ended.out
        return (tmp_path / "out" / "analysis.md").read_text()

    return run


def test_the_documentation_shows_the_file() -> None:
    shown = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    assert f"```python\n{EXAMPLE.read_text('utf-8')}```\n" in shown


@pytest.mark.slow
def test_the_example_runs(page: Callable[[Path], str]) -> None:
    text = page(EXAMPLE)
    assert "| rank | held-out loss [95%] | the last gradient's norm [95%] |" in text
    assert "Ours: held-out loss of rank 4 less that of rank 2, nats; " in text


@pytest.mark.slow
def test_one_entry_adds_a_metric(page: Callable[[Path], str], tmp_path: Path) -> None:
    text = EXAMPLE.read_text("utf-8")
    assert text.count(FIRST_LINE) == 1
    entry = '    "steps": Metric(lambda member: len(member.losses), "steps"),\n'
    changed = tmp_path / "ranks.py"
    changed.write_text(text.replace(FIRST_LINE, FIRST_LINE + entry))
    shown = page(changed)
    assert "| rank | steps | held-out loss [95%] | the last gradient's norm [95%] |" in shown
    assert "| 2 | 2 [2, 2], n = 2 |" in shown
