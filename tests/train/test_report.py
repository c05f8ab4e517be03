import dataclasses
import html
import io
import json
import math
import os
import re

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from qlora_jax.runtime.errors import UserError
from qlora_jax.train.report import (
    EVAL_COLOUR,
    SET_COLOURS,
    TRAIN_COLOUR,
    RunSummary,
    Sample,
    SetLoss,
    plot_loss,
    print_samples,
    running_mean,
    write_report,
    write_samples,
)

SAMPLES = [
    Sample("What does `f` do?", "It adds.", "I *don't*\n    know | $x$ <b>", "It adds numbers."),
    Sample("And [g]?", "Nothing.", "", "Nothing at all."),
]


@pytest.fixture
def summary(tmp_path):
    rows = [{"step": 0, "eval/loss": 3.0}]
    rows += [{"step": s, "train/loss": 2.5 - s / 50} for s in range(1, 51)]
    rows += [{"step": 51, "train/loss": None}, {"step": 50, "eval/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return RunSummary(
        model="smollm2-135m-instruct",
        method="qlora",
        quantization="nf4, block 64, double quantization",
        rank=16,
        trainable=1_000_000,
        total=101_000_000,
        device="Some CPU (cpu, 2 cores)",
        base_hash="2:" + "ab" * 32,
        steps=50,
        skipped=0,
        wall_s=332.0,
        tokens=123_456,
        tokens_per_s=812.4,
        peak_rss_bytes=3 * 2**29,
        eval_before=3.0,
        eval_after=2.0,
        eval_tokens=4_321,
        samples=SAMPLES,
        command="qlora-jax train configs/quickstart.yaml",
        run_dir=str(tmp_path),
    )


def cells(markdown):
    """Returns the cells of all table rows by the first cell of the row."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line[:1] == "|"]
    return {row[0].strip(): [c.strip() for c in row[1:]] for row in rows}


def unescape(cell):
    text = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell.replace("<br>", "\n"))
    return html.unescape(text).replace("\xa0", " ")


def test_the_report_says_what_ran_and_what_it_achieved(summary, tmp_path):
    path = write_report(summary)
    assert path == tmp_path / "report.md"
    text = path.read_text()
    table = cells(text)
    assert table["loss (nats per token)"] == ["3.0000", "2.0000", "-33.3%"]
    assert table["perplexity"] == [f"{math.e**3:.2f}", f"{math.e**2:.2f}", "-63.2%"]
    assert table["trainable"] == ["1,000,000 of 101,000,000 parameters (0.990%)"]
    assert table["peak memory, process"] == ["1.50 GiB"]
    assert table["time"] == ["5:32 (m:ss)"]
    assert "4,321 target tokens" in text
    assert "qlora-jax train configs/quickstart.yaml" in text
    assert f"qlora-jax generate {tmp_path} --prompt 'What does `f` do?'" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert "/" not in link
    assert {"loss_curve.png", "manifest.json"} <= set(re.findall(r"\]\(([^)]+)\)", text))
    written = {"metrics.jsonl", "report.md", "samples.md", "loss_curve.png"}
    assert set(os.listdir(tmp_path)) == written


def test_the_exported_step_is_named_with_its_reason(summary):
    last = dataclasses.replace(summary, planned_steps=50, exported_step=50)
    assert cells(write_report(last).read_text())["exported"] == ["step 50 of 50, the last one"]
    best = dataclasses.replace(
        last, planned_steps=90, exported_step=30, keep_best=True, patience=2, eval_after=1.25
    )
    assert cells(write_report(best).read_text())["exported"] == [
        "step 30 of 90, the lowest held-out loss, 1.2500; stopped early at step 50, no lower "
        "held-out loss in 2 evaluations in a row (train.patience)"
    ]
    # manifests of earlier versions do not name the exported step
    assert "exported" not in cells(write_report(summary).read_text())


def test_each_held_out_set_has_its_row_and_its_line(summary, tmp_path):
    rows = [
        {"step": s, "eval/loss": 3.0, "eval/code/loss": 3.0 - s / 50, "eval/my_prose/loss": 2.9}
        for s in (0, 25, 50)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sets = {
        "code": SetLoss(before=3.0, after=2.0, tokens=1234),
        "my_prose": SetLoss(before=2.9, after=2.9, tokens=5),
    }
    table = cells(write_report(dataclasses.replace(summary, eval_sets=sets)).read_text())
    assert table["code, 1,234 target tokens: loss"] == ["3.0000", "2.0000", "-33.3%"]
    assert table["my\\_prose, 5 target tokens: loss"] == ["2.9000", "2.9000", "+0.0%"]
    assert "perplexity" not in table
    image = matplotlib.image.imread(tmp_path / "loss_curve.png")
    for colour in SET_COLOURS[:2]:
        assert np.ptp(columns(image, colour)) > 0.7 * image.shape[1]


def test_what_there_is_none_of_is_not_made_up(summary):
    full = dataclasses.replace(
        summary,
        method="full",
        quantization="",
        rank=None,
        base_hash="",
        eval_before=None,
        eval_after=None,
        eval_tokens=0,
        samples=[],
        skipped=2,
        peak_device_bytes=2**30,
    )
    text = write_report(full).read_text()
    table = cells(text)
    assert "perplexity" not in table
    assert "No examples were held out" in text
    assert table["frozen weights"] == ["none"]
    assert table["adapter rank"] == ["no adapters"]
    assert table["optimizer steps"] == ["50, 2 of them skipped because a gradient overflowed"]
    assert table["peak memory, device"] == ["1.00 GiB"]
    assert "None" not in text


def test_samples_are_shown_character_by_character(tmp_path):
    write_samples(tmp_path / "samples.md", SAMPLES)
    text = (tmp_path / "samples.md").read_text()
    first = cells(text.split("### 2")[0])
    assert unescape(first["prompt"][0]) == SAMPLES[0].prompt
    assert unescape(first["before"][0]) == SAMPLES[0].before
    assert "<b>" not in text
    assert cells(text.split("### 2")[1])["before"] == [""]


def test_answers_are_printed_side_by_side():
    console = Console(file=io.StringIO(), width=60)
    print_samples(console, SAMPLES)
    lines = console.file.getvalue().splitlines()
    assert any("before" in line and "after" in line for line in lines)
    assert any("I *don't*" in line and "It adds numbers." in line for line in lines)
    assert any("And [g]?" in line for line in lines)
    assert all(len(line) <= 60 for line in lines)


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def columns(image, colour):
    return np.flatnonzero((np.abs(image[..., :3] - rgb(colour)).max(-1) < 0.02).any(0))


def test_the_picture_shows_both_curves(summary, tmp_path):
    write_report(summary)
    image = matplotlib.image.imread(tmp_path / "loss_curve.png")
    height, width = image.shape[:2]
    assert width >= 1000
    assert height >= 600
    for colour in (TRAIN_COLOUR, EVAL_COLOUR):
        found = columns(image, colour)
        assert np.ptp(found) > 0.7 * width


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "train/loss": math.nan}],
        [{"step": 1, "train/loss": 1.0}],
        [{"step": 0, "eval/loss": 2.0}],
    ],
)
def test_a_short_or_broken_run_has_a_picture_too(summary, tmp_path, rows):
    plot_loss(rows, dataclasses.replace(summary, model="a/$b_{c$" * 20), tmp_path / "p.png")
    assert matplotlib.image.imread(tmp_path / "p.png").size


def test_the_running_mean_is_centred_and_keeps_the_ends():
    values = np.array([1.0, 2, 6, 3, 8, 4])
    np.testing.assert_allclose(running_mean(values, 3), [1, 3, 11 / 3, 17 / 3, 5, 4])
    np.testing.assert_array_equal(running_mean(values, 1), values)
    line = np.arange(20.0)
    np.testing.assert_allclose(running_mean(line, 7), line)


def test_a_report_needs_metrics(summary, tmp_path):
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        write_report(summary)
    assert os.listdir(tmp_path) == []
