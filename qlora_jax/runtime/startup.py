"""Prepares a process before it imports jax."""

from qlora_jax.runtime import compilation, cpu_devices, cuda_toolkit, gpu_memory, hugepages


def prepare() -> None:
    """Sets the environment for speed, for GPU memory, and for the cache of compiled programs.

    The function may restart the process, so call it before anything else.
    """
    hugepages.restart()
    compilation.use_wide_vectors()
    cpu_devices.give_threads()
    gpu_memory.claim()
    cuda_toolkit.point()
    compilation.enable_cache()
