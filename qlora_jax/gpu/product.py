"""Compiles products with a 4-bit weight for absent GPUs, and makes a record of each.

`compile_all` compiles in separate processes for two reasons: a compiler that aborts then loses one
case only, and Mosaic GPU keeps the architecture of the first compilation in a process.
"""

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.gpu import assemble, hlo, roofline, sass, times
from qlora_jax.gpu.case import DECODE_FIRST, GpuProduct
from qlora_jax.gpu.compile import NO_SPILLS, compile_for, environment, has_plugin
from qlora_jax.gpu.described import read_gpu
from qlora_jax.gpu.processes import Died, answers
from qlora_jax.gpu.sass import SassKernel
from qlora_jax.kernels.select import FUSED, module_of
from qlora_jax.quant import quantize
from qlora_jax.runtime.errors import UserError

COMMAND = [sys.executable, "-m", "qlora_jax.gpu.product"]


def describe(case: GpuProduct) -> dict[str, Any]:
    """Compiles one case in this process and returns its record.

    Returns:
      The fields of the case; `error`: message of the compiler or of a broken rule, or None;
      `temp_bytes`: bytes of temporaries; `floor_bytes`: bytes of operands and result, each once;
      `moved_bytes`: bytes of operands and results of all operations that the program runs;
      `kernels`: figures of each kernel; `seconds`: modelled seconds by each bound.
    """
    record: dict[str, Any] = {**case._asdict(), "error": None, "kernels": []}
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((case.k, case.n), jnp.float32))
    x = jax.ShapeDtypeStruct((case.rows, case.inner), case.dtype)
    module = module_of(case.implementation)
    with tempfile.TemporaryDirectory() as name, assemble.dumping(folder := Path(name)) as options:
        try:
            function = getattr(module, case.direction)
            compiled = compile_for(case.gpu, function, x, q, options=options)
            text: str = compiled.as_text()  # type: ignore[assignment]
            kernels = with_earlier(text, assemble.kernels(folder))
        except Exception as e:  # each compiler raises its own kinds of errors
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
        seconds = times.decode_first(case, operations, kernels)
    else:
        record["error"] = broken_rule(case, text, record["temp_bytes"], kernels)
        seconds = times.fused(case, record["moved_bytes"], kernels)
    return {**record, "seconds": seconds}


_dumped: dict[str, list[SassKernel]] = {}


def with_earlier(text: str, kernels: list[SassKernel]) -> list[SassKernel]:
    """Returns a program's kernels; a missing Mosaic kernel comes from an earlier compilation.

    A program has at most one Mosaic kernel. Mosaic GPU compiles and dumps equal kernels only once
    in a process; for example, the kernels of 1 row and of 16 rows are equal.
    """
    equal = re.search(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)
    if equal is None:
        return kernels
    mosaic = [kernel for kernel in kernels if kernel.name.endswith("_mosaic_gpu_kernel")]
    known = _dumped.setdefault(equal[1], mosaic)
    return kernels if mosaic else [*kernels, *known]


def widened(case: GpuProduct, text: str) -> str | None:
    """Returns an error message if products of 16-bit operands are done in float32, else None.

    A product with one row may be done in float32: XLA does so on every GPU, and its bytes bound its
    time.
    """
    if case.rows == 1 or jnp.dtype(case.dtype).itemsize != 2:
        return None
    wide = hlo.products_of(text, "f32")
    return f"products of {case.dtype} are done in float32: {', '.join(wide)}" if wide else None


def broken_rule(
    case: GpuProduct, text: str, temp_bytes: int, kernels: Sequence[SassKernel]
) -> str | None:
    """Returns the rule that a program with a fused kernel breaks, as a message; None if none."""
    limit = read_gpu(case.gpu).shared
    if FUSED[case.implementation].target not in text or not sass.launched(kernels):
        return "the program holds no kernel"
    if temp_bytes >= case.k * case.n:
        return f"{temp_bytes} bytes of temporaries beside a weight of {case.k * case.n // 2} bytes"
    for kernel in kernels:
        if kernel.spill_bytes:
            return f"{kernel.name}: spilling {kernel.spill_bytes} bytes"
        if kernel.shared > limit:
            return f"{kernel.name}: {kernel.shared} bytes of shared memory, the limit is {limit}"
    return None


def _figures(case: GpuProduct, kernel: SassKernel) -> dict[str, Any]:
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


def compile_all(cases: Iterable[GpuProduct]) -> Iterator[dict[str, Any]]:
    """Yields `describe` of each case, in their order, one process per GPU and implementation.

    Raises:
      UserError: the compile-only packages are not installed.
    """
    if not has_plugin():
        raise UserError("the compile-only GPU packages are not installed; run make gpu-check")
    for _, group in itertools.groupby(cases, key=lambda case: case[:2]):
        asked = list(group)
        made = answers(COMMAND, [json.dumps(case) for case in asked], environment(NO_SPILLS))
        for case, answer in zip(asked, made, strict=True):
            if isinstance(answer, Died):
                yield {**case._asdict(), "error": answer.reason, "kernels": []}
            else:
                yield json.loads(answer)


def main() -> None:
    """Reads cases from standard input and writes their records, one per line."""
    for line in sys.stdin:
        print(json.dumps(describe(GpuProduct(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
