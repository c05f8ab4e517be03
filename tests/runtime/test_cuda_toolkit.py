"""Tests how jax gets a CUDA toolkit, with folders that look like one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.runtime import cuda_toolkit
from qlora_jax.runtime.cuda_toolkit import jax_finds, point

ROOT = Path(__file__).parents[2]


def toolkit(folder: Path) -> Path:
    ptxas = folder / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.write_text("#!/bin/sh\n")
    ptxas.chmod(0o755)
    return folder


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces /usr/local/cuda with a folder that does not exist; hides pip's packages."""
    monkeypatch.setattr(cuda_toolkit, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(cuda_toolkit, "_nvidia", list)
    return tmp_path / "usual"


def pointed(environment: dict[str, str]) -> str | None:
    point(environment)
    return environment.get("CUDA_ROOT")


def test_candidates_in_their_order(tmp_path, usual) -> None:
    everything = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": f"/nowhere:{tmp_path / 'other' / 'bin'}",
    }
    assert pointed(dict(everything)) is None
    for name in ("usual", "other", "path", "home"):
        toolkit(tmp_path / name)
        assert pointed(dict(everything)) == str(tmp_path / name)
    assert pointed({}) == str(usual)


def test_a_link_on_the_path_leads_to_its_toolkit(tmp_path, usual) -> None:
    real = toolkit(tmp_path / "cuda-13.0")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "ptxas").symlink_to(real / "bin" / "ptxas")
    assert pointed({"PATH": str(tmp_path / "links")}) == str(real)


def test_a_ptxas_outside_a_toolkit_is_none(tmp_path, usual) -> None:
    alone = toolkit(tmp_path / "tools")
    (alone / "bin").rename(alone / "sbin")
    assert pointed({"PATH": str(alone / "sbin")}) is None


def test_what_is_set_stays(tmp_path, usual) -> None:
    toolkit(usual)
    assert pointed({"CUDA_ROOT": "mine"}) == "mine"


def test_pips_own_ptxas_comes_first(tmp_path, usual, monkeypatch) -> None:
    toolkit(usual)
    toolkit(tmp_path / "nvidia" / "cu13")
    monkeypatch.setattr(cuda_toolkit, "_nvidia", lambda: [tmp_path / "nvidia"])
    assert pointed({}) is None


@pytest.mark.parametrize(
    ("packages", "with_ptxas", "finds"),
    [
        ((), (), False),
        (("cu13",), (), False),
        (("cu13",), ("cu13",), True),
        (("cuda_nvcc",), ("cuda_nvcc",), True),
        (("cu13", "cuda_nvcc"), ("cuda_nvcc",), False),
        (("cudnn",), (), False),
    ],
)
def test_agrees_with_jax(tmp_path, packages, with_ptxas, finds) -> None:
    """The reference is jax: whether the toolkit folder that jax finds contains ptxas."""
    nvidia = tmp_path / "nvidia"
    for name in packages:
        (nvidia / name / "lib").mkdir(parents=True)
    for name in with_ptxas:
        toolkit(nvidia / name)
    assert jax_finds([nvidia]) is finds
    if importlib.util.find_spec("nvidia") is not None:
        pytest.skip("this environment has pip's CUDA packages, which jax would find as well")
    asked = "from jax._src import lib; print(lib.cuda_path)"
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_ROOT"}
    environment["PYTHONPATH"] = str(tmp_path)
    said = subprocess.check_output([sys.executable, "-c", asked], env=environment, text=True)
    assert Path(said.strip(), "bin", "ptxas").is_file() is finds


def test_nothing_is_imported(tmp_path) -> None:
    """The package nvidia raises when imported, so an import would fail the test."""
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys; from qlora_jax.runtime import cuda_toolkit; cuda_toolkit.point(); "
        "print([m for m in ('jax', 'numpy', 'nvidia') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert said.strip() == "[]"
