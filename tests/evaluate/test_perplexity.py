from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from qlora_jax.evaluate.perplexity import text_loss
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"


@pytest.fixture(scope="module")
def model():
    return load_model(open_folder(LLAMA), quant=None, dtype=jnp.float32)


def test_every_window_is_what_the_reference_logits_say(model):
    """The reference logits are from transformers, for two windows of 33 tokens."""
    reference = np.load(LLAMA / "reference.npz")
    tokens, logits = reference["tokens"], reference["logits"]
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    ids = np.append(tokens.reshape(-1), [1, 2, 3])  # 3 more tokens, which fill no window
    for batch in (1, 2, 4):
        got = text_loss(model, ids, window=33, batch=batch)
        np.testing.assert_allclose(got.windows, expected.sum(axis=1), rtol=1e-5)
    assert got.tokens == expected.size
    assert got.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)


def test_a_text_shorter_than_a_window_is_refused(model):
    with pytest.raises(UserError, match="5 tokens, less than one window of 16"):
        text_loss(model, [1] * 5, window=16)
