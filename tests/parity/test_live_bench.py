"""Compares our benchmarks with the installed peers: same work, so same losses and tokens."""

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
    """Returns a function that runs one round: our report and bitsandbytes' report."""

    def run(*arguments: Any) -> list[dict[str, Any]]:
        pytest.importorskip("bitsandbytes")
        ended = run_cli("bench", *arguments, "--peer", sys.executable, "--rounds", 1, "--json")
        assert ended.code == 0, ended.err
        (reports,) = json.loads(ended.out)["rounds"]
        return reports

    return run


def test_step(bench: Callable[..., Any], model: Path) -> None:
    ours, peer = bench("step", model, "--seq", 16, "--steps", 2, "--dtype", "float32")
    assert ours["figures"].keys() - peer["figures"].keys() == {"compile", "planned, device"}
    assert ours["trainable"] == peer["trainable"]
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], abs=1e-4)
    moments = (side["figures"]["moments"]["value"] for side in (ours, peer))
    assert next(moments) == pytest.approx(next(moments), rel=0.01)


@pytest.mark.parametrize(("name", "method"), [("smollm2-135m", "qlora"), ("qwen2.5-0.5b", "lora")])
def test_step_of_a_published_shape(bench: Callable[..., Any], name: str, method: str) -> None:
    """Both sides draw random weights of one deviation, so both first losses are near log(vocab)."""
    options = ("--seq", 16, "--batch", 1, "--steps", 1, "--rank", 4, "--method", method)
    targets = ("--target-modules", "q_proj,down_proj", "--alpha", 8)
    ours, peer = bench("step", name, *options, *targets)
    assert ours["figures"].keys() - peer["figures"].keys() == {"compile", "planned, device"}
    assert ours["trainable"] == peer["trainable"]
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], abs=0.5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("quantized", [True, False])
def test_the_peers_random_model(family: str, tied: bool, quantized: bool) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    import transformers

    from qlora_jax.bench.peers.torch_model import random_base

    shape = TINY | {"model_type": family, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}
    model = random_base(shape, torch.float32, quantized=quantized)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not any(tensor.is_meta for tensor in tensors.values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # The reference was built directly, not on the meta device, so its frequencies are right.
    whole = transformers.AutoModelForCausalLM.from_config(model.config)
    expected = whole.model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.cpu(), expected)
    linear = model.model.layers[1].mlp.down_proj
    assert (type(linear).__name__ == "Linear4bit") == quantized
    eye = torch.eye(128, device=linear.weight.device)
    assert linear(eye).std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.norm.weight.eq(1).all()


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
