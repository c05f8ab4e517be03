"""Measures the peak memory while an abstract model is filled and quantized, value by value.

Question: does the 16-bit model ever exist in memory while `qlora_jax.fill` makes a 4-bit model?
Expected: the peak is the 4-bit model, the unquantized values, and a few times the largest value.
Cost: two minutes on 2 CPU cores, about 2 GB of memory.
Command: python -m experiments.benchmarks.fill_abstract [--shape 1.1b] [--json]
"""

import json
import resource
import time

import jax
import numpy as np
from flax import nnx

import qlora_jax as qj
from experiments.benchmarks.plain_llama import SHAPES, PlainLlama
from experiments.tools import program
from qlora_jax.runtime import compilation
from qlora_jax.runtime.device import describe_devices

WHERE = r"layers\..*kernel"


def peak() -> int:
    """Returns the peak resident bytes of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drawn(path: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns random values in the model's dtype, in place of values from a file."""
    random = np.random.default_rng(len(path))
    values = random.standard_normal(shape.shape, np.float32)
    values *= 0.02
    return values.astype(shape.dtype)


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    compilation.give_memory_back()
    model = nnx.eval_shape(lambda: PlainLlama(SHAPES[options.shape], nnx.Rngs(0)))
    whole = qj.summary(model)
    before, start = peak(), time.perf_counter()
    qj.fill(model, drawn, WHERE)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds, after = time.perf_counter() - start, peak()
    found = qj.summary(model)
    figures = {
        "shape": options.shape,
        "parameters": whole.frozen.parameters,
        "bytes in 16 bits": whole.frozen.bytes,
        "bytes quantized": found.quantized.bytes,
        "bytes not quantized": found.frozen.bytes,
        "peak before": before,
        "peak": after,
        "seconds": seconds,
        "device": str(describe_devices()),
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:<20} {value:,}" if isinstance(value, int) else f"{name:<20} {value}")
    return 0


if __name__ == "__main__":
    program.run(main)
