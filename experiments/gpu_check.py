"""Do the kernels compile for GPUs that are not here, without spilling a register?

Expected: every kernel, in every dtype, for every GPU of sm_80 and newer; no buffer of the weight
  in floats beside them.
Cost: half a minute on 2 CPU cores; no GPU, no driver. Needs the extra `gpu-check`.
Command: make gpu-check
"""

import argparse
import json
import os
import sys
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.memory.compile import FLAGS, GPUS, compile_for, environment, has_plugin, read_gpu

K = N = 4096
ROWS = (1, 32, 512)
DTYPES = ("bfloat16", "float16", "float32")


def check(gpu: str, rows: int, dtype: str, direction: str) -> dict[str, Any]:
    """Compiles one kernel; `error` is the compiler's message, or None."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.kernels import triton
    from qlora_jax.quant import quantize

    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((K, N), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, K if direction == "forward" else N), dtype)
    case = {"gpu": gpu, "rows": rows, "dtype": dtype, "direction": direction}
    try:
        compiled = compile_for(gpu, getattr(triton, direction), x, q)
    except jax.errors.JaxRuntimeError as e:
        return {**case, "kernels": 0, "temp_bytes": None, "error": str(e).splitlines()[0]}
    kernels = compiled.as_text().count("__gpu$xla.gpu.triton")
    temp = compiled.memory_analysis().temp_size_in_bytes
    error = None
    if not kernels:
        error = "the program holds no kernel"
    elif temp >= K * N:
        error = f"{temp} bytes of temporaries beside a weight of {K * N // 2} bytes"
    return {**case, "kernels": kernels, "temp_bytes": temp, "error": error}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())
    if not has_plugin():
        raise UserError("the compile-only GPU packages are not installed: make gpu-check")
    gpus = [gpu for gpu in GPUS if read_gpu(gpu).capability >= (8, 0)]
    cases = [
        check(gpu, rows, dtype, direction)
        for gpu in gpus
        for rows in ROWS
        for dtype in DTYPES
        for direction in ("forward", "backward")
    ]
    failed = [case for case in cases if case["error"]]
    for case in failed:
        print("{gpu}, {rows} rows, {dtype}, {direction}: {error}".format(**case), file=sys.stderr)
    if options.json:
        print(json.dumps(cases, indent=1))
    else:
        each = (len(cases) - len(failed)) / len(gpus)
        spilled = sum("spilling" in case["error"] for case in failed)
        print(f"{each:g} kernels x {len(gpus)} GPUs compiled, {spilled} spilled")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
