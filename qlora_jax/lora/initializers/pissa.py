"""PiSSA (arXiv 2404.02948): initializes the adapter with the largest singular values of W.

With W = U S Vᵀ and r = rank, section 3 of the paper gives (equations 2 to 4), here with a scale:

    a = U[:, :r] (S[:r] / scale)^(1/2),    b = (S[:r] / scale)^(1/2) Vᵀ[:r]
    residual = W − scale · a @ b

The residual is the stored weight. For a base in 4 bits it is quantized (QPiSSA, section 4).
"""

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight, best_low_rank, residual
from qlora_jax.lora.weights import LoraWeights


def pissa(task: InitInput) -> tuple[StoredWeight, LoraWeights]:
    """Returns the stored form of W − scale · a @ b, and a, b from the largest singular values."""
    a, b = best_low_rank(task.weight, task.spec.rank, task.spec.scale, task.dtype)
    return task.store(residual(task.weight, a, b, task.spec.scale)), task.weights(a, b)
