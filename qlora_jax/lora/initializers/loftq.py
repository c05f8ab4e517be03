"""LoftQ (arXiv 2310.08659): initializes the adapter so that it corrects the quantization error.

Algorithm 1 reduces ‖W − stored − scale · a @ b‖ (equation 6) by alternating two steps, from
a = b = 0. Any codebook can be used:

    stored = quantize(W − scale · a @ b)                                  (equation 7)
    a, b   = best_low_rank(W − dequantize(stored)), by the truncated SVD  (equations 8 and 9)
"""

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight, best_low_rank, residual
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.quant import to_float32


def loftq(task: InitInput) -> tuple[StoredWeight, LoraWeights]:
    """Returns the quantized weight of the last iteration, and a and b that correct its error."""
    rest, spec = task.weight, task.spec
    for _ in range(task.iterations):
        stored = task.store(rest)
        a, b = best_low_rank(task.weight - to_float32(stored), spec.rank, spec.scale, task.dtype)
        rest = residual(task.weight, a, b, spec.scale)
    return stored, task.weights(a, b)
