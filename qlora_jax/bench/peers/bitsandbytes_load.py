"""Measures time and memory of loading a checkpoint into bitsandbytes' NF4, doubly quantized."""

import time
from typing import Any

import torch

from qlora_jax.bench import measure
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import LoadOptions, to_tree
from qlora_jax.bench.peers.torch_model import device_memory, load_base, nbytes, synchronize


def run(options: LoadOptions) -> dict[str, Any]:
    """Loads the model once and returns the report."""
    memory = PeakMemory()
    imported = time.perf_counter()
    with OtherProcesses() as neighbours:
        model = load_base(options.model, torch.bfloat16, quantized=True)
        synchronize()
        loaded = time.perf_counter()
    return measure.report(
        "bitsandbytes + transformers",
        ["torch", "bitsandbytes", "transformers", "safetensors"],
        to_tree(options),
        {
            "load": figure("s", loaded - imported),
            "import": figure("s", imported - measure.STARTED),
            "peak memory": figure("MiB", memory.process()),
            "memory after": figure("MiB", memory.now()),
            "weights": figure("MiB", nbytes(model) / 2**20),
            **device_memory(),
        },
        others_cores=neighbours.cores,
    )
