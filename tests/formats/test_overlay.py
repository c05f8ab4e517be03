from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.overlay import overlay

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def tied(models: Path):
    checkpoint = open_folder(models / "qwen2")
    assert checkpoint.config.tie_embeddings
    return checkpoint


def test_nothing_replaced_is_the_checkpoint_itself(tied) -> None:
    assert overlay(tied, {}) is tied


def test_other_tensors_leave_the_tie_alone(tied) -> None:
    norm = np.full(tied.shape(NORM), 2, np.float32)
    found = overlay(tied, {NORM: norm})
    assert found.config == tied.config
    assert found.names() == tied.names()
    np.testing.assert_array_equal(found.read(NORM), norm)
    np.testing.assert_array_equal(found.read(EMBED), tied.read(EMBED))


@pytest.mark.parametrize(
    ("replaced", "tied_flag", "embed", "head"),
    [
        ({EMBED: 1}, False, 1, 0),  # PEFT trains a copy of the embedding; the head keeps W
        ({HEAD: 1}, False, 0, 1),
        ({EMBED: 1, HEAD: 2}, False, 1, 2),
        ({EMBED: 1, HEAD: 1}, False, 1, None),
        ({EMBED: 1, HEAD: 1}, True, 1, None),
        ({EMBED: 1}, True, 1, None),  # ensure_weight_tying
        ({HEAD: 1}, True, 1, None),
        ({EMBED: 0}, False, 0, None),  # saved without a change
        ({HEAD: 0}, False, 0, None),
    ],
)
def test_a_tie_holds_while_both_matrices_are_equal(tied, replaced, tied_flag, embed, head) -> None:
    base = tied.read(EMBED)
    values = {name: (base + change).astype(np.float32) for name, change in replaced.items()}
    found = overlay(tied, values, tied=tied_flag)
    assert found.config.tie_embeddings == (head is None)
    assert (HEAD in found.names()) == (head is not None)
    np.testing.assert_array_equal(found.read(EMBED), base + embed)
    if head is not None:
        np.testing.assert_array_equal(found.read(HEAD), base + head)
        assert found.shape(HEAD) == base.shape


def test_the_same_values_in_another_dtype_are_equal(tied) -> None:
    narrow = tied.read(EMBED).astype(ml_dtypes.bfloat16)
    found = overlay(tied, {EMBED: narrow, HEAD: narrow.astype(np.float32)})
    assert found.config.tie_embeddings


def test_an_untied_model_keeps_two_matrices(models: Path) -> None:
    llama = open_folder(models / "llama")
    same = np.zeros(llama.shape(EMBED), np.float32)
    found = overlay(llama, {EMBED: same, HEAD: same})
    assert not found.config.tie_embeddings
    assert found.names() == llama.names()
