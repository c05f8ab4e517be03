"""Exchanges adapters of head and embedding with PEFT in both directions: the same logits."""

import jax
import numpy as np
import pytest
from pairs import REASON, our_logits, ours, save, their_logits, theirs, tokens, torch

from qlora_jax.config import LoraConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.peft import check_fits, write_adapter
from qlora_jax.formats.peft import read_adapter as read
from qlora_jax.formats.write import write_model
from qlora_jax.lora import LoraWeights
from qlora_jax.models.adapters import set_adapter
from qlora_jax.models.decoder import attach
from qlora_jax.models.weight_shapes import adaptable
from qlora_jax.text.bpe import train_bpe
from qlora_jax.train.export import adapters
from qlora_jax.train.targets import targets

peft = pytest.importorskip("peft", reason=REASON)
pytestmark = pytest.mark.parity

USUAL = ["q_proj", "lm_head", "embed_tokens"]
TARGETS = {
    "llama": USUAL,
    "llama-tied": USUAL,
    "gemma": USUAL,
    "gemma2": USUAL,  # has a cap on the logits
    "gemma3": USUAL,  # its embedding module also scales
    "gpt_neox": ["query_key_value", "lm_head", "embed_in"],
    "opt": USUAL,
}
each_kind = pytest.mark.parametrize("kind", TARGETS)


def moved(peer) -> None:
    """Draws every adapter matrix at random, so that none is zero."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in peer.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def their_adapter(folder, out, wanted, **more):
    """Returns a PEFT model over a folder and saves its adapter to `out`."""
    settings = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 10, "target_modules": wanted, "task_type": "CAUSAL_LM"} | more
    )
    peer = peft.get_peft_model(theirs(folder), settings)
    moved(peer)
    peer.save_pretrained(out)
    return peer.eval()


def wearing(folder, adapter):
    """Returns our model with a saved adapter."""
    model, found = ours(folder), read(adapter)
    check_fits(found, model.config, adapter)
    set_adapter(model, found.adapters)
    return model


@each_kind
@pytest.mark.parametrize("only", [None, 1, 2], ids=["all", "head", "embedding"])
def test_we_compute_what_peft_does_with_its_adapter(tmp_path, kind, only):
    folder = save(tmp_path / "model", kind, seed=1)
    wanted = TARGETS[kind] if only is None else [TARGETS[kind][only]]
    peer = their_adapter(folder, tmp_path / "adapter", wanted, use_rslora=True)
    model = wearing(folder, tmp_path / "adapter")
    assert len(model.outer_adapters()) == (2 if only is None else 1)
    ids = tokens(model, seed=1)
    expected = their_logits(peer, ids)
    assert np.abs(expected - our_logits(ours(folder), ids)).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)


@each_kind
def test_peft_computes_what_we_do_with_our_adapter(tmp_path, kind):
    folder = save(tmp_path / "model", kind, seed=2)
    model = ours(folder)
    config = LoraConfig(rank=4, alpha=10, target_modules=TARGETS[kind])
    specs = targets(config, model.config)
    random = np.random.default_rng(0)

    def drawn(path: str) -> LoraWeights:
        sizes = adaptable(model.config)[path]
        a, b = (0.1 * random.normal(size=size) for size in ((sizes[0], 4), (4, sizes[1])))
        return LoraWeights(a.astype(np.float32), b.astype(np.float32), 10.0, 2.5)

    attach(model, specs, jax.random.key(0), values={path: drawn(path) for path in specs})
    write_adapter(tmp_path / "adapter", adapters(model), base_name=str(folder))
    base = theirs(folder)
    ids = tokens(model, seed=2)
    without = their_logits(base, ids)
    peer = peft.PeftModel(base, peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    result = peer.load_adapter(tmp_path / "adapter", "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    expected = their_logits(peer.eval(), ids)
    assert np.abs(expected - without).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("only", [None, 1, 2], ids=["all", "head", "embedding"])
@each_kind
def test_transformers_computes_with_the_merged_model(tmp_path, kind, only):
    folder = save(tmp_path / "model", kind, seed=3)
    wanted = TARGETS[kind] if only is None else [TARGETS[kind][only]]
    peer = their_adapter(folder, tmp_path / "adapter", wanted)
    model = wearing(folder, tmp_path / "adapter")
    source = MergedCheckpoint(model, open_folder(folder))
    text = train_bpe(["some text"], 300, "test")
    write_model(source, tmp_path / "merged", None, "float32", tokenizer=text)
    merged = theirs(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    ids = tokens(model, seed=3)
    expected = their_logits(peer, ids)
    np.testing.assert_allclose(their_logits(merged, ids), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(our_logits(ours(tmp_path / "merged"), ids), expected, atol=1e-4)


def test_a_fresh_adapter_of_an_embedding_is_drawn_as_pefts(tmp_path):
    folder = save(tmp_path / "model", "llama", seed=4)
    settings = peft.LoraConfig(r=64, target_modules=["embed_tokens"])
    module = peft.get_peft_model(theirs(folder), settings).base_model.model.model.embed_tokens
    model = ours(folder)
    lora = LoraConfig(rank=64, target_modules=["embed_tokens"])
    attach(model, targets(lora, model.config), jax.random.key(0))
    a, b = (np.asarray(v.get_value()) for v in (model.embed_adapter.a, model.embed_adapter.b))
    their_a, their_b = (
        found["default"].detach().numpy().T
        for found in (module.lora_embedding_A, module.lora_embedding_B)
    )
    assert a.shape == their_a.shape
    assert b.shape == their_b.shape
    assert not a.any()
    assert not their_a.any()
    for drawn in (b, their_b):
        assert abs(drawn.mean()) < 0.1
        assert drawn.std() == pytest.approx(1, abs=0.1)


def test_one_adapter_for_tied_matrices_is_read_as_two(tmp_path):
    folder = save(tmp_path / "model", "llama-tied", seed=5)
    wanted = ["q_proj", "embed_tokens"]
    peer = their_adapter(folder, tmp_path / "adapter", wanted, ensure_weight_tying=True)
    model = wearing(folder, tmp_path / "adapter")
    embedding, head = model.outer_adapters().values()
    np.testing.assert_array_equal(embedding.a.get_value().T, head.b.get_value())
    ids = tokens(model, seed=5)
    np.testing.assert_allclose(our_logits(model, ids), their_logits(peer, ids), atol=1e-4, rtol=0)
