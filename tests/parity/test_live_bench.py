"""The benchmarks beside the installed peers: the same work, so the same losses and tokens."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.bench import random_models

pytestmark = pytest.mark.parity

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    random_models.write(folder, random_models.COMMON | TINY)
    return folder


@pytest.fixture
def bench(run_cli: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Reports of one round: ours and bitsandbytes'."""

    def run(*arguments: Any) -> list[dict[str, Any]]:
        pytest.importorskip("bitsandbytes")
        ended = run_cli("bench", *arguments, "--peer", sys.executable, "--rounds", 1, "--json")
        assert ended.code == 0, ended.err
        (reports,) = json.loads(ended.out)["rounds"]
        return reports

    return run


def test_step(bench: Callable[..., Any], model: Path) -> None:
    ours, peer = bench("step", model, "--seq", 16, "--steps", 2, "--dtype", "float32")
    assert ours["figures"].keys() - peer["figures"].keys() == {"compile"}
    assert ours["trainable"] == peer["trainable"]
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], abs=1e-4)


def test_generate(bench: Callable[..., Any], model: Path) -> None:
    options = ("--prompt", 7, "--tokens", 12, "--samples", 2, "--dtype", "float32")
    ours, peer = bench("generate", model, *options)
    assert ours["figures"].keys() == peer["figures"].keys()
    assert ours["ids"] == peer["ids"]
    assert len(peer["ids"]) == 12


def test_load(bench: Callable[..., Any], model: Path) -> None:
    ours, peer = bench("load", model)
    assert ours["figures"].keys() == peer["figures"].keys()


def test_kernels(bench: Callable[..., Any]) -> None:
    ours, peer = bench("kernels", "--shapes", "128x64", "--rows", "1,3", "--samples", 2)[:2]
    assert ours["figures"].keys() == peer["figures"].keys()
