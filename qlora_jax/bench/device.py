"""Memory of a GPU, as jax counts it."""

import jax

from qlora_jax.bench.measure import Figure, figure


def device_memory() -> dict[str, Figure]:
    """The peak since the process began, where the device counts it; CPUs do not."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak memory, device": figure("MiB", peak / 2**20)}
