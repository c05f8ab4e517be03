"""PiSSA (arXiv 2404.02948): the adapter starts as W's largest singular values.

In 4 bits the rest is quantized (QPiSSA, section 4): it is what is left after the large values.
"""

from qlora_jax.lora.init.split import Parts, Task, remainder, top


def pissa(task: Task) -> Parts:
    """a and b from the top of W's decomposition, and W − scale · a @ b stored."""
    a, b = top(task.weight, task.rank, task.scale, task.dtype)
    return Parts(task.store(remainder(task.weight, a, b, task.scale)), a, b)
