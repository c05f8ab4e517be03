import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import QuantConfig
from qlora_jax.errors import UserError
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load
from qlora_jax.models import generate as module
from qlora_jax.models.generate import Sampling, draw, generate, padded_size

PAD = 0
PROMPTS = [[5, 17, 201], [9], list(range(40, 81)), [5, 17, 201]]
LENGTH = 96
greedy = functools.partial(generate, stop_ids=(), pad_id=PAD, dtype=jnp.float32)


@pytest.fixture(scope="module", params=["float", "nf4"])
def model(request, models):
    quant = None if request.param == "float" else QuantConfig()
    return load(open_folder(models / "llama"), quant=quant, dtype=jnp.float32)


@jax.jit
def last_logits(weights, tokens, length):
    """Logits of the token at length - 1, the whole row computed afresh."""
    model = nnx.merge(last_logits.structure, weights)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, ones, positions, dtype=jnp.float32)
    return model.logits(hidden[:, length - 1])[0]


def without_cache(model, prompt, new):
    last_logits.structure, weights = nnx.split(model)
    ids = list(prompt)
    for _ in range(new):
        row = np.full((1, LENGTH), PAD, np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.argmax(last_logits(weights, row, len(ids)))))
    return ids[len(prompt) :]
