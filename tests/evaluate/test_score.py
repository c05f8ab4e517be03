from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.evaluate.score import Pair, rolling, score
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
WIDTH = 64


@pytest.fixture(scope="module")
def model():
    return load_model(open_folder(LLAMA), quant=None, dtype=jnp.float32)


@pytest.fixture(scope="module")
def logits(model):
    """Returns a function from ids to float64 logits [n, vocab]; later padding has no effect."""

    @jax.jit
    def padded(tokens):
        places = jnp.arange(WIDTH)[None]
        return model.logits(model.hidden(tokens, jnp.ones_like(tokens), places, dtype=jnp.float32))[
            0
        ]

    def run(ids):
        tokens = jnp.asarray([[*ids, *[0] * (WIDTH - len(ids))]], jnp.int32)
        return np.asarray(padded(tokens), np.float64)[: len(ids)]

    return run


def dense(logits, pair: Pair, limit: int):
    """Computes the log-likelihood by a softmax over all logits, in float64: the reference."""
    ids = [*pair.context, *pair.continuation][-(limit + 1) :]
    found = logits(ids[:-1])[-len(pair.continuation) :]
    p = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    own = p[np.arange(len(p)), pair.continuation]
    return np.log(own).sum(), bool((found.argmax(-1) == pair.continuation).all())


def random_pairs(model, lengths, seed=0):
    random = np.random.default_rng(seed)
    draw = random.integers
    vocab = model.config.vocab_size
    return [Pair(draw(0, vocab, a).tolist(), draw(0, vocab, b).tolist()) for a, b in lengths]


@pytest.mark.parametrize("limit", [None, 24])
def test_equals_a_dense_softmax(model, logits, limit):
    pairs = random_pairs(model, [(1, 1), (5, 3), (55, 2), (2, 24), (20, 9), (31, 1), (3, 3)])
    scores = score(model, pairs, dtype=jnp.float32, pad_id=0, batch_size=3, max_length=limit)
    for pair, found in zip(pairs, scores):
        expected, greedy = dense(logits, pair, limit or WIDTH)
        assert found.log_likelihood == pytest.approx(expected, abs=2e-4)
        assert found.greedy == greedy


def test_the_likeliest_tokens_are_greedy(model, logits):
    context = random_pairs(model, [(12, 1)])[0].context
    order = np.argsort(logits(context)[-1])
    pairs = [Pair(context, [int(order[-1])]), Pair(context, [int(order[-2])])]
    scores = score(model, pairs, dtype=jnp.float32, pad_id=0, batch_size=3)
    assert [s.greedy for s in scores] == [True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood


def test_all_continuations_of_one_token_add_up_to_one(model):
    context = [5, 6, 7]
    pairs = [Pair(context, [i]) for i in range(model.config.vocab_size)]
    scores = score(model, pairs, dtype=jnp.float32, pad_id=0, batch_size=3)
    assert sum(np.exp(s.log_likelihood) for s in scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
def test_rolling_scores_every_id_once_with_the_most_context(count):
    ids = list(range(100, 100 + count))
    pairs = rolling(ids, 1, 8)
    assert [i for pair in pairs for i in pair.continuation] == ids
    given = [1, *ids]
    done = 0
    for pair in pairs:
        done += len(pair.continuation)
        whole = [*pair.context, *pair.continuation]
        assert whole == given[: done + 1][-len(whole) :]
        assert len(whole) - 1 == min(8, done)


def test_bad_input(model):
    def run(pair):
        score(model, [pair], dtype=jnp.float32, pad_id=0, batch_size=1, max_length=4)

    with pytest.raises(UserError, match="pair 0: an empty context"):
        run(Pair([], [1]))
    with pytest.raises(UserError, match="5 tokens does not fit 4 positions"):
        run(Pair([1], [1, 2, 3, 4, 5]))
