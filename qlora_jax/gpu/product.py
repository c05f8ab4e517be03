"""One product with a 4-bit weight, compiled for a GPU that is not here, and what became of it.

`compile_all` does so in processes of their own: a compiler that aborts takes one case with it, and
Mosaic GPU keeps the architecture of the first compilation in a process.
"""

import collections
import importlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.gpu import hlo, roofline, sass
from qlora_jax.gpu.compile import NO_SPILLS, compile_for, environment, has_plugin, read_gpu
from qlora_jax.gpu.processes import Died, answers
from qlora_jax.gpu.roofline import Ceilings, Time
from qlora_jax.gpu.sass import Kernel
from qlora_jax.kernels.select import FUSED
from qlora_jax.quant import quantize
from qlora_jax.runtime.errors import UserError

DIRECTIONS = ("forward", "backward")
DECODE_FIRST = "xla"
"""The implementation that decodes the weight to memory, then multiplies."""

COMMAND = [sys.executable, "-m", "qlora_jax.gpu.product"]


class Case(NamedTuple):
    """x @ W (forward: x is [rows, k]) or g @ W.T (backward: g is [rows, n]), W in NF4 with double
    quantization."""

    gpu: str
    implementation: str
    rows: int
    k: int
    n: int
    dtype: str
    direction: str

    @property
    def inner(self) -> int:
        return self.k if self.direction == "forward" else self.n

    @property
    def outer(self) -> int:
        return self.n if self.direction == "forward" else self.k


def describe(case: Case) -> dict[str, Any]:
    """Compiles one case in this process.

    Returns:
      Its fields; `error`, the compiler's or a broken rule's message, or None; `temp_bytes`;
      `floor_bytes`, operands and result once; `moved_bytes`, operands and results of everything
      that the program runs; `kernels`, figures of each; `seconds`, modelled, by what bounds it.
    """
    record: dict[str, Any] = {**case._asdict(), "error": None, "kernels": []}
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((case.k, case.n), jnp.float32))
    x = jax.ShapeDtypeStruct((case.rows, case.inner), case.dtype)
    module = importlib.import_module(f"qlora_jax.kernels.{case.implementation}")
    with tempfile.TemporaryDirectory() as name, sass.dumping(folder := Path(name)) as options:
        try:
            function = getattr(module, case.direction)
            compiled = compile_for(case.gpu, function, x, q, options=options)
            text: str = compiled.as_text()  # type: ignore[assignment]
            kernels = with_earlier(text, sass.kernels(folder))
        except Exception as e:  # several compilers, each with errors of its own
            return {**record, "error": f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"}
    operations = hlo.operations(text)
    result = case.rows * case.outer * jnp.dtype(case.dtype).itemsize
    record |= {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        "floor_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((x, q))) + result,
        "moved_bytes": sum(operation.bytes for operation in operations),
        "kernels": [_figures(case, kernel) for kernel in kernels],
    }
    if case.implementation == DECODE_FIRST:
        record["error"] = widened(case, text)
        seconds = _decode_first(case, operations, kernels)
    else:
        record["error"] = broken_rule(case, text, record["temp_bytes"], kernels)
        seconds = _fused(case, record["moved_bytes"], kernels)
    return {**record, "seconds": seconds}


_dumped: dict[str, list[Kernel]] = {}


def with_earlier(text: str, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels of a program with one Mosaic kernel, if need be from an earlier compilation.

    Mosaic GPU compiles, and dumps, equal kernels once in a process: those of 1 and of 16 rows are
    equal.
    """
    equal = re.search(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)
    if equal is None:
        return kernels
    mosaic = [kernel for kernel in kernels if kernel.name.endswith("_mosaic_gpu_kernel")]
    known = _dumped.setdefault(equal[1], mosaic)
    return kernels if mosaic else [*kernels, *known]


def widened(case: Case, text: str) -> str | None:
    """A complaint if products of 16-bit operands are done in float32; None if not.

    A product with one row, which XLA widens on every GPU, is bound by its bytes and may be.
    """
    if case.rows == 1 or jnp.dtype(case.dtype).itemsize != 2:
        return None
    wide = hlo.products_of(text, "f32")
    return f"products of {case.dtype} are done in float32: {', '.join(wide)}" if wide else None


def broken_rule(case: Case, text: str, temp_bytes: int, kernels: Sequence[Kernel]) -> str | None:
    """What is wrong with a program that is to decode within its kernel; None if nothing."""
    limit = read_gpu(case.gpu).shared
    if FUSED[case.implementation].target not in text or not _with_launch(kernels):
        return "the program holds no kernel"
    if temp_bytes >= case.k * case.n:
        return f"{temp_bytes} bytes of temporaries beside a weight of {case.k * case.n // 2} bytes"
    for kernel in kernels:
        if kernel.spill_bytes:
            return f"{kernel.name}: spilling {kernel.spill_bytes} bytes"
        if kernel.shared > limit:
            return f"{kernel.name}: {kernel.shared} bytes of shared memory, the limit is {limit}"
    return None


def _with_launch(kernels: Iterable[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.launch is not None]


def _figures(case: Case, kernel: Kernel) -> dict[str, Any]:
    loop = kernel.main_loop()
    classes = sass.histogram(loop)
    return {
        "name": kernel.name,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared,
        "launch": kernel.launch and kernel.launch._asdict(),
        "blocks_per_core": kernel.launch and roofline.occupancy(kernel, case.gpu),
        "main_loop": dict(classes),
        "main_loop_clocks": roofline.pipe_clocks(loop, roofline.RATES[case.gpu]),
        "main_loop_tensor_flop": sass.tensor_flop(loop),
    }


def tile(case: Case) -> tuple[int, int]:
    """Rows and columns of the result that one block of a fused kernel computes."""
    return FUSED[case.implementation].tile(
        case.rows,
        case.dtype,
        case.inner,
        case.outer,
        case.direction,
        read_gpu(case.gpu).capability,
    )


def _fused(case: Case, moved: int, kernels: Sequence[Kernel]) -> dict[str, float]:
    """Of the one kernel that multiplies; what it runs beside that is in the bytes alone."""
    m, o = tile(case)
    flop = 2.0 * -(-case.rows // m) * m * -(-case.outer // o) * o * case.inner
    for kernel in _with_launch(kernels):
        if sass.tensor_flop(kernel.main_loop()):
            time = roofline.fused_time(kernel, case.gpu, flop, moved)
            return {**time._asdict(), "total": time.seconds}
    return {}


def _decode_first(
    case: Case, operations: Sequence[hlo.Operation], kernels: Sequence[Kernel]
) -> dict[str, float]:
    """The decoding kernels as they were compiled, then the product as a library would do it."""
    by_name = {kernel.name: kernel for kernel in _with_launch(kernels)}
    total: dict[str, float] = collections.defaultdict(float)
    for operation in operations:
        kernel = by_name.get(operation.name.replace(".", "_"))
        multiplies = operation.multiplies or (kernel is not None and sass.multiplies(kernel.code))
        if multiplies or kernel is None:
            rows = case.rows if multiplies else 0
            time = roofline.product_time(case.gpu, rows, case.k, case.n, operation.bytes)
        else:
            time = roofline.straight_time(kernel, case.gpu, operation.bytes)
        part = "product" if multiplies else "decode"
        for name, seconds in {**time._asdict(), part: time.seconds, "total": time.seconds}.items():
            total[name] += seconds
    return dict(total)


def seconds_at(record: Mapping[str, Any], new: Ceilings) -> dict[str, float]:
    """`seconds` of a record, which are those at the data sheet's rates, at other rates.

    Nothing is compiled. Of a program that decodes first a record holds sums over its kernels. The
    bytes of its product are what decides the product's time, or what the decoding kernels leave
    where bytes decide theirs, or else operands and result once. What a sum over several kernels
    has more than the largest of its three measures is taken to stay.

    Args:
      record: of `describe`, without an error.
      new: the other rates; at those of the data sheet the result is `record["seconds"]`.
    """
    case = Case(*(record[field] for field in Case._fields))
    old, seconds = roofline.data_sheet(case.gpu), record["seconds"]
    whole = Time(*(seconds[measure] for measure in Time._fields))
    if case.implementation != DECODE_FIRST:
        time = whole.at(old, new)
        return {**time._asdict(), "total": time.seconds}
    decode, product = seconds["decode"], seconds["product"]
    if product > whole.tensor:
        moved = product
    elif decode > whole.issue:
        moved = whole.bytes - decode
    else:
        elements = case.rows * (case.k + case.n) + case.k * case.n
        moved = elements * jnp.dtype(case.dtype).itemsize / old.bandwidth
    parts = {
        "decode": (decode, Time(whole.bytes - moved, 0.0, whole.issue)),
        "product": (product, Time(moved, whole.tensor, 0.0)),
    }
    changed = {
        name: total - time.seconds + time.at(old, new).seconds
        for name, (total, time) in parts.items()
    }
    return {**whole.at(old, new)._asdict(), **changed, "total": sum(changed.values())}


def compile_all(cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """`describe` for each case, in its own order, one process per GPU and implementation.

    Raises:
      UserError: the compile-only packages are not installed.
    """
    if not has_plugin():
        raise UserError("the compile-only GPU packages are not installed: make gpu-check")
    for _, group in itertools.groupby(cases, key=lambda case: case[:2]):
        asked = list(group)
        made = answers(COMMAND, [json.dumps(case) for case in asked], environment(NO_SPILLS))
        for case, answer in zip(asked, made, strict=True):
            if isinstance(answer, Died):
                yield {**case._asdict(), "error": answer.reason, "kernels": []}
            else:
                yield json.loads(answer)


def main() -> None:
    """Reads cases from standard input, one a line, and writes their records likewise."""
    for line in sys.stdin:
        print(json.dumps(describe(Case(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
