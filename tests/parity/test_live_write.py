"""Checks that transformers loads the folders that we write and computes the same logits."""

import dataclasses

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
    transformers,
)

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.write import write_model
from qlora_jax.text.bpe import train_bpe

pytest.importorskip("bitsandbytes", reason=REASON)
pytestmark = pytest.mark.parity

ON_CPU = {"device_map": {"": "cpu"}}
each_family = pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_the_same_function(kind, tmp_path):
    original = save(tmp_path / "original", kind, 1)
    model = ours(original)
    text = train_bpe(["some text"], 300, "test")
    source = MergedCheckpoint(model, open_folder(original))
    write_model(source, tmp_path / "copy", None, "float32", tokenizer=text)
    ids = tokens(model, 1)
    expected = their_logits(theirs(original), ids)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(their_logits(theirs(tmp_path / "copy"), ids), expected)


@each_family
@pytest.mark.parametrize("codebook", ["nf4", "fp4_bnb"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_computes_with_our_4_bit_weights(tmp_path, family, codebook, double_quant):
    folder = save(tmp_path / "model", family, seed=8)
    quant = QuantConfig(codebook=codebook, double_quant=double_quant)
    write_model(open_folder(folder), tmp_path / "out", quant, "float32")
    # train(): in evaluation mode bitsandbytes may repack the weights and compute in bfloat16.
    peer = theirs(tmp_path / "out", **ON_CPU).train()
    assert type(peer.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    model = ours(tmp_path / "out")
    ids = tokens(model, seed=8)
    np.testing.assert_allclose(our_logits(model, ids), their_logits(peer, ids), atol=2e-5, rtol=0)


def test_we_read_what_transformers_saved(tmp_path):
    """transformers must quantize while loading: it cannot save a model that it loaded in 4 bits."""
    folder = save(tmp_path / "model", "llama", seed=9)
    write_model(open_folder(folder), tmp_path / "ours", QuantConfig(), "float32")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs(folder, quantization_config=settings, **ON_CPU).save_pretrained(tmp_path / "theirs")
    first, second = (open_folder(tmp_path / name) for name in ("ours", "theirs"))
    assert first.quantization.config == second.quantization.config
    assert first.names() == second.names()
    for name in first.names():
        a, b = first.read(name), second.read(name)
        if dataclasses.is_dataclass(a):
            a, b = np.asarray(a.codes), np.asarray(b.codes)
        np.testing.assert_array_equal(a, b)


@each_family
def test_transformers_computes_with_a_merged_model(tmp_path, family):
    folder = save(tmp_path / "model", family, seed=10)
    model = ours(folder, QuantConfig())
    adapt(model, LoraConfig(rank=4), seed=10)
    write_model(MergedCheckpoint(model, open_folder(folder)), tmp_path / "out", None, "float32")
    ids = tokens(model, seed=10)
    expected = our_logits(model, ids)
    assert torch.float32 == theirs(tmp_path / "out").dtype
    np.testing.assert_allclose(their_logits(theirs(tmp_path / "out"), ids), expected, atol=2e-5)
