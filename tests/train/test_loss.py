"""token_loss against a dense cross-entropy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax.train import loss as module
from qlora_jax.train.loss import COLUMNS, ROWS, token_loss

D, VOCAB = 8, 32
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def make(
    shape: tuple[int, ...], share: float, dtype: str = "float32", seed: int = 0, vocab: int = VOCAB
):
    """Makes hidden, head, targets and a mask that is true at about `share` of the positions."""
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(*shape, D)), dtype)
    head = jnp.asarray(random.normal(size=(D, vocab)), dtype)
    targets = jnp.asarray(random.integers(0, vocab, shape), jnp.int32)
    return hidden, head, targets, jnp.asarray(random.random(shape) < share)


def dense(hidden, head, targets, mask, softcap=None):
    """Returns sum, count, and the sum's gradients of hidden and head, in float64: the reference."""
    hidden, head = (np.asarray(x).astype(np.float64) for x in (hidden, head))
    targets, mask = np.asarray(targets), np.asarray(mask)
    flat = hidden.reshape(-1, hidden.shape[-1])[mask.reshape(-1)]
    targets = targets.reshape(-1)[mask.reshape(-1)]
    logits = flat @ head
    slope = 1.0
    if softcap:
        capped = np.tanh(logits / softcap)
        logits, slope = softcap * capped, 1 - capped**2
    top = logits.max(axis=-1, keepdims=True, initial=0)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    dlogits = (np.exp(log_p) - np.eye(head.shape[1])[targets]) * slope
    dhidden = np.zeros_like(hidden)
    dhidden[mask] = dlogits @ head.T
    total = -np.take_along_axis(log_p, targets[:, None], axis=1).sum()
    return total, mask.sum(), dhidden, flat.T @ dlogits


@jax.jit
def ours(hidden, head, targets, mask):
    """Returns sum and count of `token_loss`, and the gradients of 0.5 * sum."""

    def half(hidden, head):
        total, count = token_loss(hidden, head, targets, mask, train_head=True)
        return 0.5 * total, (total, count)

    grads, (total, count) = jax.grad(half, argnums=(0, 1), has_aux=True)(hidden, head)
    return total, count, *grads


def assert_matches(found, expected, factor: float, epsilon: float) -> None:
    total, count, *grads = (np.asarray(x).astype(np.float64) for x in found)
    np.testing.assert_allclose(total, expected[0], rtol=4e-6)
    assert count == expected[1]
    for ours, exact in zip(grads, expected[2:]):
        atol = epsilon * max(np.abs(exact).max(), 1e-6)
        np.testing.assert_allclose(ours, factor * exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("shape", "share"),
    [((3,), 1), ((ROWS,), 0.9), ((ROWS + 1,), 1), ((3, 2, 117), 0.6)],
)
@pytest.mark.quick
def test_value_and_gradients(shape, share) -> None:
    arguments = make(shape, share)
    assert_matches(ours(*arguments), dense(*arguments), 0.5, 2e-6)


@pytest.mark.quick
def test_a_head_stored_with_the_vocabulary_first() -> None:
    hidden, head, targets, mask = make((3, 2, 117), 0.6)

    @jax.jit
    def value(hidden, rows):
        return token_loss(hidden, rows, targets, mask, vocab_axis=0, train_head=True)[0]

    total, (dhidden, drows) = jax.value_and_grad(value, argnums=(0, 1))(hidden, head.T)
    found = total, mask.sum(), dhidden, drows.T
    assert_matches(found, dense(hidden, head, targets, mask), 1, 2e-6)


@pytest.mark.parametrize(
    "vocab", mostly_slow([COLUMNS, COLUMNS + 1, 2 * COLUMNS + 1037], COLUMNS, 2 * COLUMNS + 1037)
)
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.quick
def test_a_vocabulary_in_blocks(vocab, vocab_axis) -> None:
    hidden, head, targets, mask = make((3, 117), 0.6, vocab=vocab)
    # targets at the ends of blocks; the largest logits in the first and in the last block
    targets = targets.at[0, :4].set(jnp.array([0, COLUMNS - 1, vocab - 1, vocab - COLUMNS]))
    head = head.at[:, 0].mul(4).at[:, -1].mul(4)

    def value(hidden, head):
        stored = head if vocab_axis else head.T
        return token_loss(hidden, stored, targets, mask, vocab_axis=vocab_axis, train_head=True)[0]

    total, grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(hidden, head)
    assert_matches((total, mask.sum(), *grads), dense(hidden, head, targets, mask), 1, 4e-6)


@pytest.mark.parametrize(("vocab", "vocab_axis"), [(VOCAB, 0), (COLUMNS + 1, 1)])
@pytest.mark.quick
def test_logits_with_a_soft_cap(vocab, vocab_axis) -> None:
    softcap = 2.5
    hidden, head, targets, mask = make((3, 117), 0.6, vocab=vocab)

    @jax.jit
    def value(hidden, head):
        stored = head if vocab_axis else head.T
        options = {"vocab_axis": vocab_axis, "train_head": True, "softcap": softcap}
        return token_loss(hidden, stored, targets, mask, **options)[0]

    total, grads = jax.value_and_grad(value, argnums=(0, 1))(hidden, head)
    expected = dense(hidden, head, targets, mask, softcap)
    plain = dense(hidden, head, targets, mask)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(expected, plain) if np.ndim(a))
    assert_matches((total, mask.sum(), *grads), expected, 1, 4e-6)


def make_update(shape, vocab, dtype="float32", rank=3):
    """Makes low [..., rank] and b [rank, vocab] of an adapted head."""
    random = np.random.default_rng(9)
    low = jnp.asarray(random.normal(size=(*shape, rank)), dtype)
    return low, jnp.asarray(random.normal(size=(rank, vocab)), jnp.float32)


def with_update(hidden, head, targets, mask, low, b, softcap=None):
    """Returns the results of `dense` for [hidden, low] @ [head; b], gradients by part."""
    wide = np.concatenate([np.asarray(x, np.float64) for x in (hidden, low)], -1)
    tall = np.concatenate([np.asarray(x, np.float64) for x in (head, b)])
    total, count, dwide, dtall = dense(wide, tall, targets, mask, softcap)
    return total, count, dwide[..., :D], dtall[:D], dwide[..., D:], dtall[D:]


@pytest.mark.parametrize(
    ("vocab", "vocab_axis", "softcap", "train_head"),
    [
        (VOCAB, 1, None, False),
        (VOCAB, 0, 2.5, True),
        (COLUMNS + 1, 0, None, False),
        (COLUMNS + 1, 1, 2.5, False),
    ],
)
@pytest.mark.quick
def test_a_head_with_an_update_of_low_rank(vocab, vocab_axis, softcap, train_head) -> None:
    hidden, head, targets, mask = make((3, 117), 0.6, vocab=vocab)
    low, b = make_update((3, 117), vocab)

    def value(hidden, head, low, b):
        stored = head if vocab_axis else head.T
        options = {"vocab_axis": vocab_axis, "train_head": train_head, "softcap": softcap}
        return token_loss(hidden, stored, targets, mask, update=(low, b), **options)[0]

    total, grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))(hidden, head, low, b)
    expected = list(with_update(hidden, head, targets, mask, low, b, softcap))
    assert all(np.abs(x).max() > 0.1 for x in expected[2:])
    if not train_head:
        expected[3] = np.zeros_like(expected[3])
    assert_matches((total, mask.sum(), *grads), expected, 1, 4e-6)


@pytest.mark.quick
def test_the_gradients_of_an_update_are_those_of_small_differences() -> None:
    arguments, (low, b) = make((40,), 0.7), make_update((40,), VOCAB)
    random = np.random.default_rng(4)
    along = [jnp.asarray(random.normal(size=x.shape), jnp.float32) for x in (low, b)]

    def value(t):
        return token_loss(*arguments, update=(low + t * along[0], b + t * along[1]))[0]

    slope = float(jax.grad(value)(0.0))
    step = 1e-2
    difference = float(value(step) - value(-step)) / (2 * step)
    assert abs(slope) > 1
    assert slope == pytest.approx(difference, rel=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.quick
def test_an_updates_gradients_in_16_bits(dtype) -> None:
    hidden, head, targets, mask = make((3, 117), 0.6, dtype)
    low, b = make_update((3, 117), VOCAB, dtype)
    b = b.astype(dtype).astype(jnp.float32)

    def value(hidden, low, b):
        return token_loss(hidden, head, targets, mask, update=(low, b))[0]

    total, grads = jax.value_and_grad(value, argnums=(0, 1, 2))(hidden, low, b)
    assert [g.dtype for g in grads] == [dtype, dtype, jnp.float32]
    whole = with_update(hidden, head, targets, mask, low, b)
    expected = whole[0], whole[1], whole[2], *whole[4:]
    assert_matches((total, mask.sum(), *grads), expected, 1, EPSILON[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.quick
def test_gradients_in_16_bits(dtype) -> None:
    arguments = make((3, 2, 117), 0.6, dtype)
    found = ours(*arguments)
    assert found[0].dtype == jnp.float32
    assert {g.dtype for g in found[2:]} == {jnp.dtype(dtype)}
    # The logits' gradient and the result are each rounded once.
    assert_matches(found, dense(*arguments), 0.5, EPSILON[dtype])


@pytest.mark.quick
def test_small_probabilities_survive_float16() -> None:
    # Each of 1000 wrong tokens has probability 1.5e-6: 25.4 times float16's smallest number.
    head = np.zeros((2, 1001), np.float32)
    head[0, -1], head[1, :-1] = 13.4, 1.0
    arguments = jnp.array([[1.0, 0.0]], jnp.float16), jnp.asarray(head, jnp.float16)
    arguments += jnp.array([1000]), jnp.array([True])
    dhidden = np.asarray(ours(*arguments)[2]).astype(np.float64)
    expected = 0.5 * dense(*arguments)[2]
    np.testing.assert_allclose(dhidden[0, 1], expected[0, 1], rtol=2e-3)


@pytest.mark.quick
def test_nothing_to_learn_from() -> None:
    arguments = make((2, 40), 0)
    total, count, *grads = ours(*arguments)
    assert (float(total), float(count)) == (0, 0)
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("share", [0.5, 0])
@pytest.mark.quick
def test_what_is_not_finite_without_loss_goes_nowhere(share, bad) -> None:
    hidden, head, targets, mask = make((3, 2, 117), share)
    dirty = jnp.where(mask[..., None], hidden, bad)
    found = ours(dirty, head, targets, mask)
    assert_matches(found, dense(hidden, head, targets, mask), 0.5, 2e-6)


@pytest.mark.quick
def test_what_is_not_finite_with_loss_shows() -> None:
    hidden, head, targets, mask = make((3, 2, 117), 1)
    total, _, dhidden, _ = ours(hidden.at[1, 1, 5].set(jnp.nan), head, targets, mask)
    assert math.isnan(total)
    assert math.isnan(dhidden[1, 1, 5, 0])


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.quick
def test_only_chunks_with_targets_are_computed(train_head, monkeypatch) -> None:
    seen = []
    loss = module._loss

    def counted(figures, mask):
        jax.debug.callback(lambda n: seen.append(int(n)), mask.sum())
        return loss(figures, mask)

    monkeypatch.setattr(module, "_loss", counted)
    hidden, head, targets, _ = make((10 * ROWS,), 1)
    mask = jnp.arange(10 * ROWS) % 9 == 5
    wanted = [ROWS, int(mask.sum()) - ROWS]
    assert 0 < wanted[1] < ROWS

    def total(hidden):
        return token_loss(hidden, head, targets, mask, train_head=train_head)[0]

    for run in (total, jax.grad(total)):
        seen.clear()
        jax.block_until_ready(run(hidden))
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == wanted


@pytest.mark.quick
def test_an_untrained_head_gets_no_gradient_and_hidden_the_same() -> None:
    hidden, head, targets, mask = make((3, 2, 117), 0.6)
    _, pull = jax.vjp(lambda h, w: token_loss(h, w, targets, mask)[0], hidden, head)
    dhidden, dhead = pull(jnp.float32(1))
    np.testing.assert_array_equal(dhead, np.zeros((D, VOCAB)))
    np.testing.assert_allclose(dhidden, dense(hidden, head, targets, mask)[2], atol=2e-6)


@pytest.mark.quick
def test_a_tied_embedding_gets_the_gradient_of_both_its_uses() -> None:
    random = np.random.default_rng(3)
    embed = random.normal(size=(VOCAB, D)).astype(np.float32)
    tokens = random.integers(0, VOCAB, (2, 9))
    _, _, targets, mask = make((2, 9), 0.7)

    def total(embed):
        return token_loss(embed[tokens], embed.T, targets, mask, train_head=True)[0]

    _, _, dhidden, dhead = dense(embed[tokens], embed.T, targets, mask)
    lookup = np.zeros((VOCAB, D))
    np.add.at(lookup, tokens, dhidden)
    found = jax.grad(total)(jnp.asarray(embed))
    np.testing.assert_allclose(found, lookup + dhead.T, atol=4e-6)
    assert np.abs(lookup).max() > 0.1
    assert np.abs(dhead).max() > 0.1


def test_memory_of_one_block_of_logits_with_an_update() -> None:
    positions, vocab, rank = 8 * ROWS, 8 * COLUMNS, 4
    hidden, head = jnp.zeros((positions, D)), jnp.zeros((D, vocab))
    low, b = jnp.zeros((positions, rank)), jnp.zeros((rank, vocab))
    targets, mask = jnp.zeros(positions, jnp.int32), jnp.ones(positions, bool)

    def loss(hidden, low, b):
        return token_loss(hidden, head, targets, mask, update=(low, b))[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(hidden, low, b).compile()
    block, gradients = ROWS * COLUMNS * 4, 3 * (hidden.nbytes + low.nbytes + b.nbytes)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * block + gradients
    assert 3 * block + gradients < positions * vocab * 4 / 10


@pytest.mark.parametrize("train_head", [False, True])
def test_memory_of_one_block_of_logits(train_head) -> None:
    positions, vocab = 8 * ROWS, 8 * COLUMNS
    hidden, head = jnp.zeros((positions, D)), jnp.zeros((D, vocab))
    targets, mask = jnp.zeros(positions, jnp.int32), jnp.ones(positions, bool)

    def loss(hidden, head):
        return token_loss(hidden, head, targets, mask, train_head=train_head)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
    block, gradients = ROWS * COLUMNS * 4, 3 * (hidden.nbytes + head.nbytes)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * block + gradients
    assert 3 * block + gradients < positions * vocab * 4 / 10
