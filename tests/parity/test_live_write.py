"""What we write as a Hugging Face folder, loaded by transformers."""

import numpy as np
import pytest
from pairs import KINDS, ours, save, their_logits, theirs, tokens

from qlora_jax.data.bpe import train_bpe
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.write import write_model

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_the_same_function(kind, tmp_path):
    original = save(tmp_path / "original", kind, 1)
    model = ours(original)
    text = train_bpe(["some text"], 300, "test")
    source = MergedCheckpoint(model, open_folder(original))
    write_model(source, tmp_path / "copy", None, "float32", text=text)
    ids = tokens(model, 1)
    expected = their_logits(theirs(original), ids)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(their_logits(theirs(tmp_path / "copy"), ids), expected)
