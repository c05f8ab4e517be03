"""LoftQ (arXiv 2310.08659, algorithm 1): the adapter starts as what quantizing loses.

Quantizing W − s·a·b and taking the top of what that leaves of W alternate, with any codebook.
"""

from qlora_jax.lora.init.split import Parts, Task, decoded, remainder, top


def loftq(task: Task) -> Parts:
    """The last of `iterations` quantized weights, with the best a and b for what it leaves."""
    rest = task.weight
    for _ in range(task.iterations):
        stored = task.store(rest)
        a, b = top(task.weight - decoded(stored), task.rank, task.scale, task.dtype)
        rest = remainder(task.weight, a, b, task.scale)
    return Parts(stored, a, b)
