"""KL divergence and loss; the reference is float64 arithmetic on the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import QuantConfig
from qlora_jax.evaluate.divergence import divergence, see
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model

pytestmark = pytest.mark.quick


def log_p(model, batch):
    graph, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens, segments, positions):
        model = nnx.merge(graph, state)
        return model.logits(model.hidden(tokens, segments, positions, dtype=jnp.float32))

    inputs = [batch[key] for key in ("tokens", "segments", "positions")]
    scores = np.asarray(logits(state, *inputs), np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_means_are_over_the_targets_of_all_batches(tiny_model):
    source = open_folder(tiny_model)
    exact = load_model(source, quant=None, dtype=jnp.float32)
    rounded = load_model(source, quant=QuantConfig(), dtype=jnp.float32)
    random = np.random.default_rng(0)
    batches = []
    for rows in (3, 3):
        tokens = random.integers(0, 246, (rows, 101)).astype(np.int32)
        batches.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "mask": random.random((rows, 100)) < 0.3,
                "segments": np.ones((rows, 100), np.int32),
                "positions": np.tile(np.arange(100, dtype=np.int32), (rows, 1)),
            }
        )
    kl, loss, count = 0.0, 0.0, 0
    for batch in batches:
        p, q = log_p(exact, batch), log_p(rounded, batch)
        kl += (np.exp(p) * (p - q)).sum(-1)[batch["mask"]].sum()
        loss -= np.take_along_axis(q, batch["targets"][..., None], -1)[..., 0][batch["mask"]].sum()
        count += batch["mask"].sum()
    found = divergence(*(see(model, batches, jnp.float32) for model in (exact, rounded)))
    assert found.tokens == count
    np.testing.assert_allclose(found.kl, kl / count, rtol=1e-4)
    np.testing.assert_allclose(found.loss, loss / count, rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(loss / count), rtol=1e-5)
    assert found.kl > 1e-4
