"""Tests `qlora-jax sweep`: runs, results and messages; files that the cells write count runs."""

import collections
import errno
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from qlora_jax.sweep import find, results
from qlora_jax.sweep.experiment import Cell

pytestmark = pytest.mark.slow

Sweep = Callable[..., Any]


def lines(toy: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (toy.out / "results.jsonl").read_text().splitlines()]


def test_a_sweep_leaves_its_results(toy: Any, sweep: Sweep) -> None:
    ended = sweep("--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["cells"] == {"done": 8, "skipped": 4}
    assert told["verdict"] == json.loads((toy.out / "verdict.json").read_text())
    assert told["verdict"]["question"] == "Does it?"
    assert told["verdict"]["paper"] == "Yes (table 1)."
    assert told["verdict"]["verdict"] == "agrees"
    table = pyarrow.parquet.read_table(toy.out / "results.parquet").to_pylist()
    assert len(table) == 12
    for row in table:
        assert row["status"] == ("skipped" if row["rank"] == 4096 else "done")
        assert row["error"] == ("rank above the matrix" if row["rank"] == 4096 else "")
        assert row["loss"] == (None if row["rank"] == 4096 else row["rank"] / 8 + row["seed"])
    assert len({row["pid"] for row in table if row["pid"]}) == 1
    page = (toy.out / "analysis.md").read_text()
    assert "| 8 | 4 |" in page
    assert page.count("rank above the matrix") == 4
    manifest = json.loads((toy.out / "manifest.json").read_text())
    assert manifest["seeds"] == [0, 1]
    assert manifest["command"].startswith("qlora-jax sweep ")
    assert manifest["finished"]
    assert manifest["versions"]["jax"]
    record = lines(toy)[-1]
    assert record["format"] == 1
    assert record["wall_s"] > 0
    assert record["versions"]["python"]


def test_what_is_done_is_not_run_again(toy: Any, sweep: Sweep) -> None:
    assert sweep("--where", "rank=8").code == 0
    assert len(toy.runs()) == 4
    kept = (toy.out / "results.jsonl").read_bytes()
    assert sweep().code == 0
    assert max(collections.Counter(toy.runs("began")).values()) == 1
    assert len(toy.runs()) == 8
    assert (toy.out / "results.jsonl").read_bytes().startswith(kept)
    assert sweep().code == 0
    assert len(toy.runs("began")) == 8
    assert len(lines(toy)) == 12
    assert len(json.loads((toy.out / "manifest.json").read_text())["earlier"]) == 2


def test_a_sweep_killed_twice_runs_no_cell_twice(toy: Any, sweep: Sweep) -> None:
    toy.write("time.sleep(0.1)")
    for count in (2, 5):
        process = toy.start("--jobs", "2")
        toy.wait_for("ended", count)
        process.kill()
        process.wait()
        recorded = lines(toy)
        # A killed cell may run again; a recorded cell must not.
        before = collections.Counter(toy.runs("began"))
    ended = sweep()
    assert ended.code == 0, ended.err
    after = collections.Counter(toy.runs("began"))
    for record in recorded:
        if record["status"] == "done":
            assert after[record["id"]] == before[record["id"]]
    done = [record["id"] for record in lines(toy) if record["status"] == "done"]
    assert len(done) == len(set(done)) == 8
    # At most two cells were running at each of the two kills and so began again.
    assert sum(after.values()) <= 8 + 4


def test_workers_of_a_killed_sweep_end(toy: Any) -> None:
    toy.write("time.sleep(60)")
    process = toy.start()
    toy.wait_for("began", 1)
    process.kill()
    process.wait()
    began = time.monotonic()
    with results.Results(
        toy.out, find.load_experiment(toy.path)
    ):  # waits for the worker, which holds the lock
        assert time.monotonic() - began < results.LOCK_SECONDS
    assert toy.runs() == []


def test_two_sweeps_cannot_share_a_folder(
    toy: Any, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LOCK_SECONDS", 0.1)
    toy.out.mkdir()
    with results.Results(toy.out, find.load_experiment(toy.path)):
        ended = sweep()
    assert ended.code == 2
    assert "another sweep is writing there; wait for it, or give another --out" in ended.err
    assert toy.runs("began") == []


FAULTS = """faults = {
        ("qlora", 0): lambda: int("of rank\\n16"),
        ("lora", 0): lambda: os.kill(os.getpid(), 9),
        ("qlora", 1): lambda: os._exit(3),
        ("lora", 1): lambda: 0,
    }
    if cell["rank"] == 16:
        faults[cell["method"], cell["seed"]]()
        return {"loss": run, "method": 1} if cell["seed"] else {"rank": 1}
"""
ERRORS = {
    ("qlora", 0): "ValueError: invalid literal for int() with base 10: 'of rank\\n16'",
    ("lora", 0): "worker died (SIGKILL)",
    ("qlora", 1): "worker died (exit code 3)",
    ("lora", 1): "ValueError: a figure cannot be called method: that is a column already",
}


def test_failed_cells_do_not_stop_the_rest(toy: Any, sweep: Sweep) -> None:
    toy.write(FAULTS)
    ended = sweep()
    assert ended.code == 1
    assert ended.message.startswith("qlora-jax: 4 of 12 cells failed")
    assert ended.err.count("failed: rank=16 method=") == 4
    failed = [line for line in lines(toy) if line["status"] == "failed"]
    errors = {(x["values"]["method"], x["values"]["seed"]): x["error"] for x in failed}
    assert errors == ERRORS
    assert len(toy.runs()) == 4
    assert len(toy.runs("began")) == 8
    toy.write()
    assert sweep().code == 1
    assert len(toy.runs("began")) == 8
    assert sweep("--retry-failed").code == 0
    assert len(toy.runs("began")) == 12
    assert len(toy.runs()) == 8


def test_what_a_cell_prints_is_in_its_log(toy: Any, sweep: Sweep) -> None:
    toy.write("print('hello'); os.system('echo from a child'); assert cell['seed'] == 0")
    ended = sweep("--where", "rank=8", "--where", "method=lora")
    assert "hello" not in ended.out + ended.err
    done, failed = lines(toy)
    logs = [(toy.out / "work" / line["id"] / "log.txt").read_text() for line in (done, failed)]
    assert logs[0] == "hello\nfrom a child\n"
    assert "Traceback" in logs[1]
    assert "AssertionError" in logs[1]


def test_a_torn_line_is_run_again(toy: Any, sweep: Sweep) -> None:
    assert sweep("--where", "rank=8").code == 0
    file = toy.out / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    lost = json.loads(whole.splitlines()[-1])["id"]
    assert sweep("--where", "rank=8").code == 0
    assert collections.Counter(toy.runs())[lost] == 2
    assert len(toy.runs()) == 5
    assert {line["id"] for line in lines(toy)} == {json.loads(x)["id"] for x in whole.splitlines()}


@pytest.mark.parametrize("line", ['{"format": 1}', '{"format": "\\ud800"}'])
def test_a_line_that_is_none_is_refused(toy: Any, sweep: Sweep, line: str) -> None:
    toy.out.mkdir()
    (toy.out / "results.jsonl").write_text(line + "\n")
    ended = sweep()
    assert ended.code == 2
    assert f"{toy.out}/results.jsonl:1: not a result; restore the file" in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "has results of format 0, not format 1; give another --out"),
        ({"version": 3}, "has results of version 3, not version 1; give another --out"),
        ({"experiment": "other"}, "has results of experiment other, not experiment toy"),
    ],
)
def test_results_of_another_kind_are_refused(
    toy: Any, sweep: Sweep, change: dict[str, Any], message: str
) -> None:
    toy.out.mkdir()
    file = toy.out / "results.jsonl"
    head = {"format": 1, "experiment": "toy", "version": 1}
    body = {"id": "a", "values": {}, "status": "done", "error": "", "rows": [], "wall_s": 1.0}
    file.write_text(json.dumps(head | change | body | {"versions": {}}) + "\n")
    kept = file.read_bytes()
    ended = sweep()
    assert ended.code == 2
    assert message in ended.message
    assert file.read_bytes() == kept
    file.unlink()
    with results.Results(toy.out, find.load_experiment(toy.path)):  # the refusal left no lock
        pass


def test_jobs_run_side_by_side(toy: Any, sweep: Sweep) -> None:
    # The first two cells wait for each other, so jobs that run in turn would time out.
    toy.write(
        "deadline = time.monotonic() + 30\n"
        "    while len((RAN / 'began').read_text().split()) < 2:\n"
        "        assert time.monotonic() < deadline\n"
        "        time.sleep(0.01)"
    )
    ended = sweep("--jobs", "2", "--where", "rank=8,16")
    assert ended.code == 0, ended.err
    assert len(toy.runs()) == 8
    assert len({line["rows"][0]["pid"] for line in lines(toy)}) == 2


def test_a_full_disk_in_one_line(toy: Any, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep("--where", "rank=8").code == 0
    kept = (toy.out / "results.jsonl").read_bytes()
    real = results.os.fsync

    def full(number: int) -> None:
        if (toy.out / "results.jsonl").samefile(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    ended = sweep("--where", "rank=16")
    monkeypatch.setattr(results.os, "fsync", real)
    assert ended.code == 2
    assert ended.message == (
        f"qlora-jax: {toy.out}: no space left on this disk; free some, or write to another folder"
    )
    assert (toy.out / "results.jsonl").read_bytes() == kept
    assert sweep().code == 0
    assert len({line["id"] for line in lines(toy)}) == 12


def test_a_disk_that_a_cell_fills_stops_the_sweep(toy: Any, sweep: Sweep) -> None:
    toy.write("if cell['rank'] == 16: raise OSError(28, 'No space left on device')")
    ended = sweep()
    assert ended.code == 2
    assert "no space left on this disk" in ended.message
    assert "repeat the command to continue" in ended.message
    assert [line["status"] for line in lines(toy)].count("done") == 4
    assert not any(line["status"] == "failed" for line in lines(toy))
    toy.write()
    assert sweep().code == 0


def test_a_dry_run_runs_nothing(toy: Any, sweep: Sweep) -> None:
    toy.write(more="estimate=lambda cell: __import__('qlora_jax').sweep.Estimate(90, 2**30),")
    assert sweep("--where", "rank=8", "--where", "seed=0").code == 0
    ended = sweep("--dry-run")
    assert ended.code == 0, ended.err
    assert len(toy.runs("began")) == 2
    assert ended.out.count("  done\n") == 2
    assert ended.out.count("  to run\n") == 6
    assert ended.out.count("  skipped: rank above the matrix\n") == 4
    assert "12 cells chosen: 2 done, 4 skipped, 6 to run\n" in ended.out
    assert "finished cells of their kind, measured on this machine\n" in ended.out
    told = json.loads(sweep("--dry-run", "--json").out)
    assert (told["done"], told["to_run"], told["seconds_from"]) == (2, 6, "measured")
    measured = [line["wall_s"] for line in lines(toy) if line["status"] == "done"]
    assert told["seconds"] == pytest.approx(6 * sum(measured) / 2)


@pytest.mark.parametrize(
    ("conditions", "count"),
    [
        (["rank=8"], 4),
        (["rank=8,16"], 8),
        (["rank=8.0"], 4),
        (["rank=8", "method=lora"], 2),
        (["seed=1"], 6),
    ],
)
def test_where(toy: Any, conditions: list[str], count: int) -> None:
    cells = find.where(find.load_experiment(toy.path).cells(), conditions)
    assert len(cells) == count


def test_where_takes_values_with_commas() -> None:
    cells = [Cell("a", {"targets": ["q", "v"]}), Cell("b", {"targets": "q,v"})]
    assert [c.id for c in find.where(cells, ['targets=["q", "v"]'])] == ["a"]
    assert [c.id for c in find.where(cells, ["targets=q,v"])] == ["b"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("rank", "write it as AXIS=VALUE"),
        ("rnak=8", "no such axis; there are: rank, method, seed"),
        ("rank=9", "no cell has rank=9; there are: 8, 16, 4096"),
        ("seed=true", "no cell has seed=true"),
    ],
)
def test_a_condition_that_cannot_be_met(sweep: Sweep, condition: str, message: str) -> None:
    ended = sweep("--where", condition)
    assert ended.code == 2
    assert message in ended.message


def test_an_unknown_experiment_names_the_nearest(
    run_cli: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    (folder / "part").mkdir(parents=True)
    for name in ("rank", "part/targets"):
        (folder / f"{name}.py").write_text("EXPERIMENT = None\n")
    (folder / "helper.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("EXPERIMENT = (\n")
    monkeypatch.chdir(tmp_path)
    ended = run_cli("sweep", "rnak")
    assert ended.code == 2
    assert "rnak: no such experiment; the nearest is rank" in ended.message
    assert find.find("part/targets", [folder]) == folder / "part" / "targets.py"
    assert "declares no EXPERIMENT = Experiment(...)" in run_cli("sweep", "rank").message
    assert "no such file" in run_cli("sweep", "rank.py").message


def test_the_analysis_alone(toy: Any, sweep: Sweep) -> None:
    assert "run the sweep first" in sweep("--analyse-only").message
    assert sweep().code == 0
    (toy.out / "analysis.md").unlink()
    assert sweep("--analyse-only").code == 0
    assert "Does it?" in (toy.out / "analysis.md").read_text()
    assert len(toy.runs("began")) == 8


def test_an_analysis_that_fails_keeps_the_results(toy: Any, sweep: Sweep) -> None:
    toy.path.write_text(toy.path.read_text().replace('table.column("loss")', "1 / 0"))
    ended = sweep()
    assert ended.code == 1
    assert "toy: the analysis failed, ZeroDivisionError: division by zero" in ended.message
    assert len(lines(toy)) == 12
    toy.write()
    assert sweep("--analyse-only").code == 0


def test_an_interrupted_sweep_goes_on(toy: Any, sweep: Sweep) -> None:
    toy.write("time.sleep(0.3)")
    process = toy.start()
    toy.wait_for("ended", 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    toy.write()
    assert sweep().code == 0
    assert len([line for line in lines(toy) if line["status"] == "done"]) == 8


def test_seeds_can_be_chosen(toy: Any, sweep: Sweep) -> None:
    assert sweep("--where", "rank=8", "--seeds", "5,6,7").code == 0
    assert sorted(line["values"]["seed"] for line in lines(toy)) == [5, 5, 6, 6, 7, 7]
    assert "--seeds: must be whole numbers" in sweep("--seeds", "a").message
