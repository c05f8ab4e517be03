"""What we write as a Hugging Face folder, loaded by transformers."""

import numpy as np
import pytest
from pairs import KINDS, ours, save, their_logits, theirs, tokens

from qlora_jax.data.bpe import train_bpe
from qlora_jax.formats.huggingface_write import config_json, write_folder
from qlora_jax.formats.names import expected_shapes
from qlora_jax.formats.unload import parameter

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_the_same_function(kind, tmp_path):
    original = save(tmp_path / "original", kind, 1)
    model = ours(original)
    config = config_json(model.config, eos_id=[0], bos_id=None, pad_id=0)
    text = train_bpe(["some text"], 300, "test")
    write_folder(
        tmp_path / "copy",
        config,
        expected_shapes(model.config),
        lambda name: parameter(model, name),
        np.float32,
        text.fast.save_pretrained,
    )
    ids = tokens(model, 1)
    expected = their_logits(theirs(original), ids)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(their_logits(theirs(tmp_path / "copy"), ids), expected)
