"""Tests the summary of rounds against numbers computed by hand."""

from typing import Any

import pytest

from qlora_jax.bench.compare import summarize
from qlora_jax.bench.table import remarks, table


def report(tool: str, value: float | None, **more: Any) -> dict[str, Any]:
    figures = {"decode": {"unit": "tokens/s", "value": value}}
    return {
        "tool": tool,
        "versions": {"python": "3.11", "jax": "1"},
        "device": "a device",
        "others_cores": 0.5,
        "figures": figures,
        **more,
    }


ROUNDS = [
    [report("ours", 10), report("theirs", 5)],
    [report("ours", 30), report("theirs", 10)],
    [report("ours", 12), report("theirs", 48)],
]


def test_medians_are_of_rounds_and_ratios_within_one() -> None:
    summary = summarize(ROUNDS)
    assert summary["columns"] == ["ours", "theirs"]
    (row,) = summary["rows"]
    assert (row["figure"], row["unit"]) == ("decode", "tokens/s")
    assert row["cells"] == {
        "ours": {"median": 12, "low": 10, "high": 30},
        "theirs": {"median": 10, "low": 5, "high": 48},
    }
    # The median of the rounds' ratios, not the ratio of the medians, which is 1.2.
    assert row["ratios"] == {"theirs": {"median": 2, "low": 0.25, "high": 3, "each": [2, 3, 0.25]}}


def test_spread_is_the_quartiles_of_all_samples() -> None:
    def sampled(*samples: float) -> dict[str, Any]:
        figures = {"prefill": {"unit": "ms", "value": samples[1], "samples": samples}}
        return report("ours", 0) | {"figures": figures}

    (row,) = summarize([[sampled(1, 2, 9)], [sampled(3, 4, 5)]])["rows"]
    # The quartiles of 1 2 3 4 5 9 are 2.25 and 4.75; the medians of the rounds are 2 and 4.
    assert row["cells"]["ours"] == {"median": 3, "low": 2.25, "high": 4.75}
    assert row["ratios"] == {}


def test_variants_are_columns_after_their_side() -> None:
    plain = {"decode": {"unit": "tokens/s", "value": 40}}
    rounds = [[report("ours", 10, variants={"plain": plain, "empty": {}}), report("theirs", 5)]]
    summary = summarize(rounds)
    assert summary["columns"] == ["ours", "plain", "empty", "theirs"]
    (row,) = summary["rows"]
    assert {k: v["median"] for k, v in row["ratios"].items()} == {"plain": 0.25, "theirs": 2}
    assert "empty" not in row["cells"]


def test_what_is_not_known_is_left_out() -> None:
    (row,) = summarize([*ROUNDS, [report("ours", 1), report("theirs", None)]])["rows"]
    assert row["cells"].keys() == {"ours"}
    assert row["ratios"] == {}
    assert summarize([*ROUNDS, [report("ours", None), report("theirs", 1)]])["rows"] == []


def test_a_peer_at_zero_gives_no_ratio() -> None:
    (row,) = summarize([[report("ours", 1), report("theirs", 0)]])["rows"]
    assert row["cells"]["theirs"]["median"] == 0
    assert row["ratios"] == {}


def test_two_sides_of_one_tool_are_told_apart() -> None:
    same = [[report("ours", 4), report("ours", 2)]]
    assert summarize(same)["columns"] == ["ours", "ours (2)"]
    labelled = [[report("ours", 4), report("ours", 2, label="16 bits")]]
    assert summarize(labelled)["rows"][0]["ratios"]["16 bits"]["median"] == 2


def test_table() -> None:
    header, rule, row = table(summarize(ROUNDS)).splitlines()
    assert [c.strip() for c in header.split("|")[1:-1]] == [
        "median",
        "ours",
        "theirs",
        "ours / theirs",
    ]
    assert set(rule.replace("|", "").split()) == {"---"}
    # (30 - 10) / 2 is 83% of 12; (48 - 5) / 2 is 215% of 10.
    cells = ["decode, tokens/s", "12 ±83%", "10 ±215%", "2 (0.25 to 3)"]
    assert [c.strip() for c in row.split("|")[1:-1]] == cells
    assert len(header) == len(rule) == len(row)


def test_remarks() -> None:
    git = {"commit": "0123456789abcdef", "modified": True}
    ours = report("ours", 1, ids=[1, 2, 3], notes=["n"], git=git, environment={"XLA_FLAGS": "-x"})
    sides = [ours, report("theirs", 1, ids=[1, 2, 4])]
    lines = remarks([sides, [sides[0], sides[1] | {"others_cores": 1.5}]])
    assert lines[0] == "2 rounds on a device"
    assert "ours: python 3.11, jax 1, commit 0123456789 with changes, XLA_FLAGS=-x" in lines
    assert "theirs: python 3.11, jax 1" in lines
    assert "cores that other processes kept busy, at most: 1.5" in lines
    assert "tokens equal to those of theirs: the first 2" in lines
    assert lines.count("n") == 1


@pytest.mark.parametrize("losses", [[10.0, 9.0], [10.5]])
def test_remarks_show_the_first_loss_of_each_side(losses: list[float]) -> None:
    lines = remarks([[report("ours", 1, losses=[10.25]), report("theirs", 1, losses=losses)]])
    assert f"loss of the first step on the same tokens: 10.2500, {losses[0]:.4f}" in lines
