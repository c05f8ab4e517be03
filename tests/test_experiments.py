"""Checks what each experiment declares, and that today's analysis gives the committed verdicts."""

import json
import re
from pathlib import Path

import pytest

from experiments import inputs
from qlora_jax import config as configs
from qlora_jax.sweep import table
from qlora_jax.sweep.conclude import VERDICT, arranged
from qlora_jax.sweep.find import NAME, load_experiment
from qlora_jax.sweep.results import read

ROOT = Path(__file__).parents[1]
FILES = [p for p in sorted((ROOT / "experiments").glob("*.py")) if f"\n{NAME} = " in p.read_text()]
RESULTS = sorted(path.parent for path in (ROOT / "docs" / "results").glob(f"**/{VERDICT}"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is_and_how_to_run_it(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert f"\nqlora-jax sweep {path.stem}\n" in path.read_text()
    ids = [cell.id for cell in experiment.cells()]
    assert len(ids) == len(set(ids)) > 0
    if experiment.population is not None:
        keys = {experiment.population.key(cell) for cell in experiment.cells()}
        assert len(keys) < len(ids)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_estimate_is_what_its_cells_took(path):
    experiment = load_experiment(path)
    records = read(ROOT / "docs" / "results" / "sweeps" / path.stem, experiment)
    cells = [cell for cell in experiment.cells() if not experiment.skip(cell)]
    told = sum(experiment.estimate(cell).seconds for cell in cells)
    took = sum(records[cell.id].wall_s for cell in cells)
    assert told == pytest.approx(took, rel=0.1)


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_dry_run_needs_nothing(name, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    ended = run_cli("sweep", name, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["to_run"] > 0
    for wanted in told.get("inputs", ()):
        assert wanted["path"] in inputs.PRETRAINED
        assert wanted["command"].startswith("qlora-jax pretrain ")
        assert "minutes on 2 CPU cores" in wanted["cost"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_told_to_be_made_is_what_the_cells_read():
    small, whole = (
        load_experiment(ROOT / "experiments" / f"{name}.py") for name in ("rank", "datatypes")
    )
    assert {one.path for cell in small.cells() for one in small.inputs(cell)} == {
        Path("runs/pretrain_1m/model")
    }
    read = {str(one.path) for cell in whole.cells() for one in whole.inputs(cell)}
    assert read == set(inputs.PRETRAINED)
    for model, config in inputs.PRETRAINED.items():
        assert f"{configs.load_config(ROOT / config).output}/model" == model


def test_no_program_reaches_into_the_path_of_imports():
    files = (ROOT / "experiments").rglob("*.py")
    assert [file for file in files if "sys.path" in file.read_text("utf-8")] == []


def test_the_commands_of_the_documentation_are_there():
    places = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    places += [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "qlora_jax").rglob("*.py")]
    text = "\n".join(file.read_text("utf-8") for file in places)
    assert not re.search(r"python +experiments/", text)
    named = set(re.findall(r"python +-m (experiments(?:\.[a-z_]+)+)", text))
    assert len(named) > 10
    for name in named:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_there_are_those_of_the_papers():
    asked = {"datatypes", "double_quantization", "parity", "rank", "intrinsic_rank"}
    more = {"forgetting", "adapters", "normality", "memory_claims", "instruction_tuning"}
    assert asked | more <= {path.stem for path in FILES}


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_rows_still_give_the_committed_verdict(folder):
    experiment = load_experiment(ROOT / "experiments" / f"{folder.name}.py")
    analysis = experiment.analyse(
        table.table_of(arranged(experiment, read(folder, experiment).values()))
    )
    told = json.loads((folder / VERDICT).read_text())
    assert analysis.verdict.ours == told["ours"]
    assert analysis.verdict.verdict == told["verdict"]
    assert {p.stem for p in folder.glob("*.png")} == analysis.pictures.keys()
