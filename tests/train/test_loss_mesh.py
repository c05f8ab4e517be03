"""token_loss with a sharded head on eight CPU devices, against a whole head on one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from selection import mostly_slow

from qlora_jax.quant.sharded import Sharded
from qlora_jax.runtime.mesh import DATA, FSDP, ROWS, device_mesh
from qlora_jax.train import loss
from qlora_jax.train.loss import token_loss

HIDDEN, VOCAB, BATCH, LENGTH = 32, 300, 8, 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "COLUMNS", 128)
    monkeypatch.setattr(loss, "ROWS_OF_PARTS", 16)


class Case(NamedTuple):
    """A head: the axis of its vocabulary, whether it is trained, and the soft cap."""

    axis: int
    trained: bool
    softcap: float | None


def given(case: Case) -> tuple[jax.Array, ...]:
    """Makes hidden states, head, targets and mask; two devices have no loss, one has little."""
    rng = np.random.default_rng(0)
    mask = rng.random((BATCH, LENGTH)) < 0.5
    mask[[1, 3]], mask[2, 10:] = False, False
    shape = (HIDDEN, VOCAB) if case.axis else (VOCAB, HIDDEN)
    return (
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, HIDDEN)), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH))),
        jnp.asarray(mask),
    )


def of(case: Case, hidden, head, targets, mask) -> jax.Array:
    axis, trained, softcap = case
    return token_loss(
        hidden, head, targets, mask, vocab_axis=axis, train_head=trained, softcap=softcap
    )[0]


def spread(case: Case):
    """Returns loss and gradients over a mesh; each device has one row and a part of the head."""
    split = P(FSDP, None) if case.axis else P(None, FSDP)

    def one(hidden, part, targets, mask):
        def own(hidden, part):
            return of(case, hidden, Sharded(part, (-1 - case.axis,)), targets, mask)

        value, (dh, dw) = jax.value_and_grad(own, argnums=(0, 1))(hidden, part)
        return jax.lax.psum(value, ROWS), dh, jax.lax.psum(dw, DATA)

    rows = P(ROWS)
    return jax.jit(
        jax.shard_map(
            one,
            mesh=device_mesh(2, 4),
            in_specs=(rows, split, rows, rows),
            out_specs=(P(), rows, split),
            check_vma=False,
        )
    )


CASES = [Case(a, t, cap) for a in (0, 1) for t in (False, True) for cap in (None, 5.0)]


@pytest.mark.parametrize("case", mostly_slow([(case,) for case in CASES], (CASES[0],), (CASES[7],)))
def test_a_head_in_parts_is_as_a_whole_one(case: Case) -> None:
    arguments = given(case)
    value, (dh, dw) = jax.value_and_grad(lambda *x: of(case, *x), argnums=(0, 1))(*arguments)
    found = spread(case)(*arguments)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    np.testing.assert_allclose(found[1], dh, atol=1e-5)
    np.testing.assert_allclose(found[2], dw, atol=1e-5)
    assert bool(np.abs(dw).max() > 0) == case.trained


def test_no_device_has_the_whole_head() -> None:
    case = Case(1, False, None)
    text = spread(case).lower(*given(case)).compile().as_text()
    assert "f32[32,128]" in text
    assert "f32[32,300]" not in text
