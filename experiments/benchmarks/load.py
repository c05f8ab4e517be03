"""Seconds and peak memory of loading a checkpoint into NF4 with double quantization.

Command: python experiments/benchmarks/load.py MODEL [--json]
  MODEL is a Hugging Face folder, a .gguf file or a built-in name.
Cost: seconds to a minute for 1.1B parameters on 2 CPU cores; 0.6 bytes a parameter.
"""

import measure
from measure import PeakMemory

from qlora_jax import hugepages


def main() -> None:
    hugepages.restart()
    options = measure.load_arguments(__doc__).parse_args()
    memory = PeakMemory()

    import time

    import jax

    from qlora_jax.config import ModelConfig, QuantConfig
    from qlora_jax.formats.load import load
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.manifest import git_state
    from qlora_jax.models import trees
    from qlora_jax.quant import nbytes

    jax.devices()
    imported, before = time.perf_counter(), memory.now()
    checkpoint = open_checkpoint(ModelConfig(path=options.model))
    model = load(checkpoint, quant=QuantConfig(), dtype="bfloat16")
    weights = jax.block_until_ready(trees.split(model, "full")[1])
    loaded = time.perf_counter()
    measure.show(
        {
            "tool": "qlora-jax",
            **vars(options),
            "import_s": round(imported - measure.STARTED, 2),
            "load_s": round(loaded - imported, 2),
            "peak_mib": memory.process(),
            "before_load_mib": before,
            "after_load_mib": memory.now(),
            "weights_mib": round(nbytes(weights) / 2**20),
            "git": git_state(),
            **measure.surroundings(["jax", "jaxlib", "flax", "safetensors"]),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
