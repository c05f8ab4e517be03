"""PiSSA (arXiv 2404.02948): the adapter starts as W's largest singular values.

In 4 bits the rest is quantized (QPiSSA, section 4): it is what is left after the large values.
"""

from qlora_jax.lora.starts.split import Stored, Task, remainder, top
from qlora_jax.lora.weights import LoraWeights


def pissa(task: Task) -> tuple[Stored, LoraWeights]:
    """Returns W − scale · a @ b as it is stored, with a and b from the top of W's decomposition."""
    a, b = top(task.weight, task.spec.rank, task.spec.scale, task.dtype)
    return task.store(remainder(task.weight, a, b, task.spec.scale)), task.weights(a, b)
