"""Checks and times fused attention, forward and backward, beside plain XLA.

A result is right if its error is at most twice the error of plain XLA in the same dtype. Both
errors are against plain XLA in float32.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.bench.gpu import reference
from qlora_jax.bench.gpu.ceilings import median_seconds
from qlora_jax.bench.gpu.lane import FULL, HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, compile_all, usable
from qlora_jax.kernels.attention import attend, select, triton
from qlora_jax.kernels.attention.select import FUSED, PLAIN
from qlora_jax.kernels.target import capability_of

EXACT = "float32"
"""Implementation name for plain XLA in float32."""

REPEATS = {FULL: 10, REHEARSAL: 1}


class AttentionCase(NamedTuple):
    """One row of packed sequences.

    Attributes:
      tokens: length of the row.
      document: tokens of each sequence in the row; the last sequence may be shorter.
      window: largest number of keys that a query sees.
      heads, kv_heads, size: numbers of query heads and of key heads, and features of a head.
      dtype: dtype of queries, keys and values.
      softcap: argument `softcap` of `attend`.
    """

    tokens: int
    document: int
    window: int
    heads: int
    kv_heads: int
    size: int
    dtype: str = "bfloat16"
    softcap: float | None = None

    @property
    def name(self) -> str:
        capped = f", soft cap {self.softcap:g}" if self.softcap else ""
        return (
            f"{self.tokens} tokens in {self.document}, window {self.window}, "
            f"{self.heads}/{self.kv_heads} heads of {self.size}, {self.dtype}{capped}"
        )


CASES: Mapping[str, Sequence[AttentionCase]] = {
    FULL: (
        AttentionCase(8192, 8192, 8192, 32, 8, 128),
        AttentionCase(8192, 1000, 8192, 32, 8, 128),
        AttentionCase(8192, 8192, 512, 32, 32, 64, "float16"),
        AttentionCase(4095, 4095, 1024, 8, 4, 256, softcap=50.0),
        AttentionCase(4095, 1500, 4096, 32, 32, 96),
        AttentionCase(32768, 32768, 32768, 8, 1, 128),
    ),
    REHEARSAL: (
        AttentionCase(75, 40, 30, 2, 1, 16),
        AttentionCase(75, 75, 75, 1, 1, 16, softcap=2.0),
    ),
}


def names(scale: str) -> list[str]:
    """Returns the names of the results: for each case a check and two times."""
    return [
        name
        for fused in FUSED
        for case in CASES[scale]
        for name in (_name(case, fused), *(f"{_name(case, x)}: time" for x in (fused, PLAIN)))
    ]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields each case's programs: fused, plain XLA, and plain XLA in float32."""
    for fused in FUSED:
        for case in CASES[scale]:
            if not _excuse(case, fused, scale, device):
                yield from (_program(case, name) for name in (fused, PLAIN, EXACT))


def run(lane: PartContext) -> None:
    """Checks and times every case."""
    device = jax.devices()[0]
    before, triton.INTERPRET = triton.INTERPRET, lane.rehearsing
    try:
        for fused in FUSED:
            for case in CASES[lane.scale]:
                _run_case(lane, case, fused, device)
    finally:
        triton.INTERPRET = before


def _run_case(lane: PartContext, case: AttentionCase, fused: str, device: Any) -> None:
    own = [_name(case, fused), *(f"{_name(case, x)}: time" for x in (fused, PLAIN))]
    if reason := _excuse(case, fused, lane.scale, device):
        for name in own:
            lane.record.absent(name, reason)
        return
    if not lane.due(5, *own):
        return
    with lane.guard(*own, within=2 * HANGS):
        made = compile_all(
            (_program(case, name) for name in (fused, PLAIN, EXACT)), lambda: lane.left() > 5
        )
        ours, theirs, exact = map(usable, made)
        inputs = _inputs(case)
        wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(EXACT), inputs)
        results = (
            function(*x) for function, x in ((ours, inputs), (theirs, inputs), (exact, wide))
        )
        verdicts = [reference.agree(*each) for each in zip(*results)]
        worst = max(verdicts, key=lambda verdict: (not verdict.right, verdict.mean))
        lane.record.check(own[0], worst.right, **worst.measures)
        for name, function in zip(own[1:], (ours, theirs)):
            seconds = median_seconds(functools.partial(function, *inputs), REPEATS[lane.scale])
            lane.record.figure(name, "ms", 1e3 * seconds, field="attention time", case=case.name)


def _name(case: AttentionCase, implementation: str) -> str:
    return f"{implementation}, {case.name}"


def _excuse(case: AttentionCase, fused: str, scale: str, device: Any) -> str:
    """Returns the reason why a case is not run; empty if it is. A rehearsal interprets kernels."""
    if scale == REHEARSAL or fused in select.usable(capability_of(device), case.dtype, case.size):
        return ""
    return f"{fused} attention does not run on {device.device_kind}"


def _program(case: AttentionCase, implementation: str) -> BenchProgram:
    exact = implementation == EXACT
    inputs = jax.eval_shape(lambda: _inputs(case, EXACT if exact else case.dtype))
    function = _both(case, PLAIN if exact else implementation, "highest" if exact else "default")
    return BenchProgram(_name(case, implementation), function, inputs)


def _both(
    case: AttentionCase, implementation: str, precision: str
) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function of `_inputs` that gives the attention and the gradients of q, k and v."""

    def both(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        first: jax.Array,
        last: jax.Array,
        g: jax.Array,
    ) -> tuple[jax.Array, ...]:
        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(q, k, v, first, last, softcap=case.softcap, implementation=implementation)

        with jax.default_matmul_precision(precision):
            out, pull = jax.vjp(attention, q, k, v)
            return out, *pull(g)

    return both


def _inputs(case: AttentionCase, dtype: str | None = None) -> tuple[jax.Array, ...]:
    """Returns q, k, v, first, last and the gradient of the result."""
    last = jnp.arange(case.tokens, dtype=jnp.int32)[None]
    first = jnp.maximum(last // case.document * case.document, last - case.window + 1)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(heads, case.size) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v, g = (
        jax.random.normal(key, (1, case.tokens, *shape), jnp.float32).astype(dtype or case.dtype)
        for key, shape in zip(keys, (*shapes, (case.heads * case.size,)))
    )
    return q, k, v, first, last, g
