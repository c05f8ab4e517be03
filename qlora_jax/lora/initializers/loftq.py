"""LoftQ (arXiv 2310.08659, algorithm 1): the adapter starts as what quantizing loses.

Quantizing W − s·a·b and taking the top of what that leaves of W alternate, with any codebook.
"""

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight, best_low_rank, residual
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.quant import to_float32


def loftq(task: InitInput) -> tuple[StoredWeight, LoraWeights]:
    """Returns the last of `iterations` quantized weights, with the best a and b for its error."""
    rest, spec = task.weight, task.spec
    for _ in range(task.iterations):
        stored = task.store(rest)
        a, b = best_low_rank(task.weight - to_float32(stored), spec.rank, spec.scale, task.dtype)
        rest = residual(task.weight, a, b, spec.scale)
    return stored, task.weights(a, b)
