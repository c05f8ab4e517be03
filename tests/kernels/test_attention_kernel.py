"""The Triton kernels of attention in interpret mode, against a dense softmax in float32."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax.kernels.attention import attend, blocks, select, triton
from qlora_jax.kernels.attention.blocks import BLOCKS, Block, Blocks, blocks_for, padded
from qlora_jax.kernels.attention.select import Kind, agrees, pick, trusted_attention
from qlora_jax.kernels.target import compiling_for

pytestmark = pytest.mark.quick

A100 = (8, 0)
HEADS = 2
LENGTH = 75
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
SHORT = ("bfloat16", "float16")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Runs kernels as plain JAX, in small blocks: several for a sequence, the last ragged."""
    small = Blocks(Block(32, 16, 1, 1), Block(16, 32, 1, 1), Block(16, 16, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "INTERPRET", True)
        patch.setattr(blocks, "BLOCKS", {A100: {64: small}})
        yield


class Inputs(NamedTuple):
    """Inputs: q and g [B, T, H, D], k and v [B, T, H_kv, D], first and last int32[B, T]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    first: jax.Array
    last: jax.Array
    g: jax.Array


def make(
    dtype: str = "float32",
    packed: bool = True,
    window: int | None = None,
    group: int = 2,
    rows: int = 3,
    size: int = 16,
    length: int = LENGTH,
) -> Inputs:
    random = np.random.default_rng(0)

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(rows, length, heads, size)), dtype)

    last = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    first = np.zeros_like(last)
    if packed:
        for row in range(rows):
            starts = np.unique([0, *random.integers(0, length, 3)])
            first[row] = starts[np.searchsorted(starts, last[row], "right") - 1]
    if window is not None:
        first = np.maximum(first, last - window + 1)
    q, g = (normal(HEADS * group) for _ in range(2))
    return Inputs(q, normal(HEADS), normal(HEADS), jnp.asarray(first), jnp.asarray(last), g)


def dense(q, k, v, first, last, softcap: float | None = None) -> jax.Array:
    """Computes attention from all scores at once, in float32: the reference."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    places = jnp.arange(k.shape[1])
    seen = (places >= first[..., None]) & (places <= last[..., None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    return out.reshape(*out.shape[:2], -1)


@functools.partial(jax.jit, static_argnames=("kernel", "softcap"))
def results(inputs: Inputs, kernel: bool, softcap: float | None = None) -> tuple[jax.Array, ...]:
    """Returns the attention and the gradients of q, k and v."""
    *qkv, first, last, g = inputs
    if kernel:
        function = functools.partial(attend, softcap=softcap, implementation="triton")
    else:
        function = functools.partial(dense, softcap=softcap)
    out, pull = jax.vjp(lambda *x: function(*x, first, last), *qkv)
    return out, *pull(g.reshape(out.shape).astype(out.dtype))


def errors(found: tuple[jax.Array, ...], exact: tuple[jax.Array, ...]) -> list[float]:
    """Returns the largest error of each array, relative to its largest element."""
    pairs = ((np.asarray(x, np.float32), np.asarray(e, np.float32)) for x, e in zip(found, exact))
    # with a single key, q and k have zero gradients: divide by the size of the result instead
    least = np.abs(exact[0]).max()
    return [float(np.abs(x - e).max() / (np.abs(e).max() or least)) for x, e in pairs]


def assert_right(inputs: Inputs, softcap: float | None = None) -> None:
    """Allows one rounding of each result, and one of the weights and slopes in the sums."""
    wide = Inputs(*(x if x.dtype == jnp.int32 else x.astype(jnp.float32) for x in inputs))
    found, exact = results(inputs, True, softcap), results(wide, False, softcap)
    epsilon = EPSILON[inputs.q.dtype.name]
    assert [x.dtype for x in found] == [inputs.q.dtype] * 4
    # float32 sums round at every addition, by up to half of epsilon each
    assert max(errors(found, exact)) <= (16 if epsilon == EPSILON["float32"] else 2) * epsilon


@pytest.mark.parametrize(
    "dtype",
    mostly_slow(EPSILON, "bfloat16"),
)
def test_packed_segments(dtype: str) -> None:
    assert_right(make(dtype))


@pytest.mark.parametrize("dtype", EPSILON)
def test_one_segment_has_blocks_without_a_mask(dtype: str) -> None:
    assert_right(make(dtype, packed=False))


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_a_window(dtype: str, packed: bool) -> None:
    assert_right(make(dtype, packed, window=20))


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(x, marks=pytest.mark.slow) for x in SHORT)]
)
def test_a_soft_cap(dtype: str) -> None:
    assert_right(make(dtype), softcap=1.5)


def test_a_soft_cap_of_scores_far_above_it() -> None:
    """Each score is 0 or at least 2500 in size; it is exact in any order of summation."""
    inputs = make()
    assert_right(inputs._replace(q=jnp.round(inputs.q) * 1e4, k=jnp.round(inputs.k)), softcap=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 3])
def test_heads_of_queries_that_share_a_head_of_keys(group: int) -> None:
    assert_right(make(group=group))


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 64])
def test_other_head_sizes(size: int) -> None:
    assert_right(make(size=size))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 33])
def test_other_lengths(length: int) -> None:
    assert_right(make(length=length))


@pytest.mark.slow
def test_ranges_in_any_order() -> None:
    """Cases that training does not have: keys after the query, and more keys than queries."""
    random = np.random.default_rng(1)
    inputs = make(length=90)
    ends = np.sort(random.integers(0, 90, (2, 3, 40)), axis=0).astype(np.int32)
    q, g = inputs.q[:, :40], inputs.g[:, :40]
    first, last = jnp.asarray(ends)
    assert_right(Inputs(q, inputs.k, inputs.v, first, last, g))


def test_a_query_that_sees_nothing_gets_zeros_and_gives_none() -> None:
    inputs = make()
    nothing = inputs._replace(last=inputs.last.at[0, 40:].set(-1))
    out, dq, dk, dv = results(nothing, True)
    assert not out[0, 40:].any()
    assert not dq[0, 40:].any()
    assert not dk[0, 40:].any()
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


def test_rows_are_independent() -> None:
    inputs = make()
    order = np.array([2, 0, 1])
    moved = results(Inputs(*(x[order] for x in inputs)), True)
    for x, y in zip(results(inputs, True), moved):
        np.testing.assert_array_equal(x[order], y)


def test_a_key_has_no_influence_beyond_its_range() -> None:
    """Only query 50 of row 0 sees keys 40 to 45."""
    inputs = make()
    first, last = (np.minimum(x, 39) for x in (inputs.first, inputs.last))
    first[0, 50], last[0, 50] = 40, 45
    inputs = inputs._replace(first=jnp.asarray(first), last=jnp.asarray(last))
    places = np.isin(np.arange(LENGTH), np.arange(40, 46))[:, None, None]
    k, v = (np.where(places, x, y) for x, y in ((-30, inputs.k), (1e3, inputs.v)))
    changed = inputs._replace(k=jnp.asarray(k), v=jnp.asarray(v))
    others = np.arange(LENGTH) != 50
    found, moved = (results(x, True) for x in (inputs, changed))
    for i, (x, y) in enumerate(zip(found, moved)):
        kept = others if i < 2 else np.arange(LENGTH) < 40
        np.testing.assert_array_equal(x[0, kept], y[0, kept])
    assert not np.array_equal(found[0][0, 50], moved[0][0, 50])
    assert not any(gradient[0, 46:].any() for gradient in found[2:])


def test_blocks_that_no_query_sees_are_not_read() -> None:
    inputs = make()
    unseen = jnp.arange(LENGTH) < 32
    inputs = inputs._replace(first=jnp.maximum(inputs.first, 32), last=jnp.maximum(inputs.last, 32))
    k, v = (jnp.where(unseen[None, :, None, None], jnp.nan, x) for x in (inputs.k, inputs.v))
    for x, y in zip(results(inputs, True), results(inputs._replace(k=k, v=v), True)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_under_vmap_and_recomputed() -> None:
    inputs = make(rows=1)
    *qkv, first, last, g = inputs
    several = [jnp.stack([x, 2 * x]) for x in qkv]

    def loss(q, k, v):
        out = jax.checkpoint(functools.partial(attend, implementation="triton"))(
            q, k, v, first, last
        )
        return jnp.sum(out * g.reshape(out.shape))

    found = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))(*several)
    for i in range(2):
        alone = results(inputs._replace(q=several[0][i], k=several[1][i], v=several[2][i]), True)
        for x, y in zip(found, alone[1:]):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


# ---- choice of the implementation


def test_the_pick_follows_device_dtype_and_shapes() -> None:
    assert pick(4096, 128, "bfloat16") == "xla"  # a CPU
    with compiling_for(A100):
        assert pick(4096, 128, "bfloat16") == pick(64, 256, "float16") == "triton"
        assert pick(1, 128, "bfloat16") == pick(4096, 512, "bfloat16") == "xla"
        assert pick(4096, 128, "float32") == "xla"
    with compiling_for((7, 5)):
        assert pick(4096, 128, "float16") == "xla"


def test_every_head_size_has_blocks() -> None:
    for capability in (*BLOCKS, (12, 0)):
        for size in range(8, select.FUSED["triton"].head_size + 1, 8):
            found = real_blocks(capability, size)
            assert padded(size) >= size
            assert all(x & (x - 1) == 0 for block in found for x in (block.queries, block.keys))


def real_blocks(capability, size: int) -> Blocks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCKS", BLOCKS)
        return blocks_for(capability, size)


KIND = Kind("bfloat16", 16, 2)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_right_kernel_agrees(monkeypatch, softcap: float | None) -> None:
    monkeypatch.setattr(select, "CHECKED", (2, LENGTH, 1))
    assert agrees("triton", KIND._replace(softcap=softcap))


@pytest.mark.parametrize("wrong", [None, 0, 1, 2, 3])
def test_a_wrong_vector_is_seen(monkeypatch, wrong: int | None) -> None:
    """One query or key is 20% too large, in the result or in one gradient."""

    def module_of(name: str) -> SimpleNamespace:
        def returned(i: int, x: jax.Array) -> jax.Array:
            return x.at[1, 333, 0].multiply(1.2) if name == "triton" and i == wrong else x

        return SimpleNamespace(
            forward=lambda scale, softcap, q, *x: (returned(0, q), q),
            backward=lambda scale, softcap, *x: tuple(
                returned(i, y) for i, y in enumerate(x[:3], start=1)
            ),
        )

    monkeypatch.setattr(select, "module_of", module_of)
    assert agrees("triton", KIND) == (wrong is None)


def test_a_wrong_kernel_is_not_used(monkeypatch) -> None:
    class Gpu:
        device_kind, compute_capability = "NVIDIA A10", "8.6"

    class Cpu:
        device_kind = "cpu"

    said: list[str] = []
    monkeypatch.setattr(select, "agrees", lambda name, kind: False)
    assert trusted_attention(KIND, Cpu, said.append) is None  # type: ignore[arg-type]
    assert trusted_attention(KIND._replace(dtype="float32"), Gpu, said.append) is None  # type: ignore[arg-type]
    assert not said
    assert trusted_attention(KIND, Gpu, said.append) == "xla"  # type: ignore[arg-type]
    (line,) = said
    assert line.startswith("warning: attention kernel triton is wrong on NVIDIA A10 in bfloat16")
    monkeypatch.setattr(select, "agrees", lambda name, kind: True)
    assert trusted_attention(KIND, Gpu, said.append) is None  # type: ignore[arg-type]
