"""Measures time and memory of our loader: a checkpoint into NF4 with double quantization."""

import time
from typing import Any

import jax

from qlora_jax.bench import measure
from qlora_jax.bench.device import device_memory
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import LoadOptions, to_tree
from qlora_jax.bench.worker import OURS
from qlora_jax.config import ModelConfig, QuantConfig
from qlora_jax.formats.load import load_model
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.models import trees
from qlora_jax.quant import nbytes
from qlora_jax.runtime.device import describe_devices, warn_if_gpu_idle
from qlora_jax.runtime.manifest import git_state


def run(options: LoadOptions) -> dict[str, Any]:
    """Loads the model once and returns the report.

    Raises:
      UserError: the model cannot be opened.
    """
    memory = PeakMemory()
    jax.devices()
    imported = time.perf_counter()
    with OtherProcesses() as neighbours:
        checkpoint = open_checkpoint(ModelConfig(path=options.model))
        model = load_model(checkpoint, quant=QuantConfig(), dtype="bfloat16")
        weights = jax.block_until_ready(trees.split(model, "full")[1])
        loaded = time.perf_counter()
    return measure.report(
        OURS,
        ["jax", "jaxlib", "flax", "safetensors"],
        to_tree(options),
        {
            "load": figure("s", loaded - imported),
            "import": figure("s", imported - measure.STARTED),
            "peak memory": figure("MiB", memory.process()),
            "memory after": figure("MiB", memory.now()),
            "weights": figure("MiB", nbytes(weights) / 2**20),
            **device_memory(),
        },
        notes=list(filter(None, [warn_if_gpu_idle()])),
        others_cores=neighbours.cores,
        device=str(describe_devices()),
        git=git_state(),
    )
