"""The check of a kernel on a device, and the choice of an implementation."""

import jax.numpy as jnp
import pytest

from qlora_jax.kernels import matmul, select, triton, xla
from qlora_jax.kernels.matmul import product_of
from qlora_jax.kernels.target import compiling_for
from qlora_jax.quant import quantize

pytestmark = pytest.mark.quick

A100, ADA, LATER = (8, 0), (8, 9), (12, 0)


@pytest.fixture(params=["forward", "backward"])
def broken(request, monkeypatch):
    """Makes a single row of one direction of Triton's module 20% too large."""
    for direction in ("forward", "backward"):
        monkeypatch.setattr(triton, direction, getattr(xla, direction))
    right = getattr(xla, request.param)
    monkeypatch.setattr(triton, request.param, lambda x, q: right(x, q).at[0].multiply(1.2))
    product_of.cache_clear()
    yield
    product_of.cache_clear()


def test_a_wrong_kernel_is_seen(broken) -> None:
    assert not select.agrees("triton", "bfloat16")
    assert select.agrees("xla", "bfloat16")


def test_not_a_number_is_wrong(monkeypatch, broken) -> None:
    monkeypatch.setattr(triton, "forward", lambda x, q: xla.forward(x, q) * jnp.nan)
    product_of.cache_clear()
    assert not select.agrees("triton", "float16")


@pytest.mark.slow
def test_a_right_kernel_passes(monkeypatch) -> None:
    monkeypatch.setattr(triton, "INTERPRET", True)
    assert select.agrees("triton", "bfloat16")


def test_the_pick_follows_the_table(monkeypatch) -> None:
    monkeypatch.setattr(select, "usable", lambda capability, dtype: ["mosaic", "triton"])
    rows = {
        "mosaic": {A100: (range(65), range(512, 10**6)), (9, 0): (range(9),)},
        "triton": {A100: (range(129),)},
    }
    monkeypatch.setattr(select, "FUSED_ROWS", rows)
    expected = {1: "mosaic", 64: "mosaic", 65: "triton", 129: "xla", 600: "mosaic"}
    for capability in (A100, ADA):
        with compiling_for(capability):
            assert {m: select.pick(m, "bfloat16") for m in expected} == expected
    with compiling_for(LATER):
        assert [select.pick(m, "bfloat16") for m in (8, 9, 129)] == ["mosaic", "triton", "xla"]
    with compiling_for((7, 5)):
        assert select.pick(1, "float16") == "xla"


def test_on_a_cpu_the_pick_is_xla() -> None:
    assert select.pick(1, "bfloat16") == "xla"
    q = quantize(jnp.ones((64, 8)))
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert (matmul(x, q) == matmul(x, q, "xla")).all()
