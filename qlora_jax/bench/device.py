"""Reads the peak memory of a GPU from jax."""

import jax

from qlora_jax.bench.measure import Figure, figure


def device_memory() -> dict[str, Figure]:
    """Returns the peak since the process began; empty if the device counts none (a CPU)."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak memory, device": figure("MiB", peak / 2**20)}
