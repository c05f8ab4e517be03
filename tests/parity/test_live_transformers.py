"""Compares our decoder with transformers', on random weights of each family."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import (
    KINDS,
    REASON,
    adapt,
    our_logits,
    ours,
    save,
    their_logits,
    theirs,
    tokens,
    torch,
)

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.peft import write_adapter
from qlora_jax.models.generate import generate
from qlora_jax.quant import dequantize
from qlora_jax.train.export import adapters

peft = pytest.importorskip("peft", reason=REASON)
pytestmark = pytest.mark.parity
SEEDS = (1, 2)
NEW = 40


@pytest.fixture(scope="module", params=[(kind, seed) for kind in KINDS for seed in SEEDS], ids=str)
def pair(request, tmp_path_factory):
    kind, seed = request.param
    folder = save(tmp_path_factory.mktemp("model"), kind, seed)
    return theirs(folder), ours(folder), seed


def test_logits_agree(pair):
    peer, model, seed = pair
    ids = tokens(model, seed)
    expected = their_logits(peer, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_4_bit_weights_and_adapters_agree(tmp_path, kind):
    """The reference is transformers' model with our decoded weights, then also a PEFT adapter."""
    folder = save(tmp_path / "model", kind, seed=3)
    peer, model = theirs(folder), ours(folder, QuantConfig())
    with torch.no_grad():
        for path, linear, i in model.walk():
            weight = np.array(dequantize(linear.weight.get_value()))[i].T
            peer.get_submodule(path).weight.copy_(torch.from_numpy(weight.copy()))
    ids = tokens(model, seed=3)
    without = their_logits(peer, ids)
    np.testing.assert_allclose(our_logits(model, ids), without, atol=1e-4, rtol=0)
    adapt(model, LoraConfig(rank=4, alpha=8), seed=3)
    write_adapter(tmp_path / "adapter", adapters(model), base_name=str(folder))
    adapted = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    expected = their_logits(adapted, ids)
    assert np.abs(expected - without).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)


def test_greedy_tokens_agree(pair):
    peer, model, seed = pair
    prompts = [row[:n].tolist() for row, n in zip(tokens(model, seed, rows=3), (1, 7, 30))]
    expected = [greedy(peer, prompt, NEW) for prompt in prompts]
    write = functools.partial(generate, max_new_tokens=NEW, pad_id=0, dtype=jnp.float32)
    assert write(model, prompts, stop_ids=()) == expected
    stop = expected[1][9]
    until = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert write(model, prompts, stop_ids=[stop]) == until


def greedy(peer, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    peer.generation_config.eos_token_id = None
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
