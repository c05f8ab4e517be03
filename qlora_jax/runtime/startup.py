"""Sets up a process of ours before it imports jax."""

from qlora_jax.runtime import compilation, cpu_devices, cuda_toolkit, gpu_memory, hugepages


def prepare() -> None:
    """Sets the process up for speed, for most of a GPU's memory, and to keep what it compiles.

    It may start the process anew, so it comes first.
    """
    hugepages.restart()
    compilation.widen()
    cpu_devices.give_threads()
    gpu_memory.claim()
    cuda_toolkit.point()
    compilation.keep()
