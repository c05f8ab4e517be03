"""PiSSA (arXiv 2404.02948): the adapter starts as W's largest singular values.

In 4 bits the rest is quantized (QPiSSA, section 4): it is what is left after the large values.
"""

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight, best_low_rank, residual
from qlora_jax.lora.weights import LoraWeights


def pissa(task: InitInput) -> tuple[StoredWeight, LoraWeights]:
    """Returns W − scale · a @ b as it is stored, with a and b from the top of W's decomposition."""
    a, b = best_low_rank(task.weight, task.spec.rank, task.spec.scale, task.dtype)
    return task.store(residual(task.weight, a, b, task.spec.scale)), task.weights(a, b)
