"""Seconds and peak memory of loading a checkpoint into bitsandbytes' NF4 with double quantization.

The counterpart of load.py, with its figures; for an environment with the `parity` extra.

Command: python experiments/benchmarks/peer_load.py MODEL [--json]
  MODEL is a Hugging Face folder.
Cost: half a minute and 4 GB for 1.1B parameters on 2 CPU cores.
"""

import os

import measure
from measure import PeakMemory


def main() -> None:
    options = measure.load_arguments(__doc__).parse_args()
    memory = PeakMemory()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import time

    import torch
    from peer_model import load_base, nbytes

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    imported, before = time.perf_counter(), memory.now()
    model = load_base(options.model, torch.bfloat16, quantized=True)
    loaded = time.perf_counter()
    measure.show(
        {
            "tool": "bitsandbytes + transformers",
            **vars(options),
            "import_s": round(imported - measure.STARTED, 2),
            "load_s": round(loaded - imported, 2),
            "peak_mib": memory.process(),
            "before_load_mib": before,
            "after_load_mib": memory.now(),
            "weights_mib": round(nbytes(model) / 2**20),
            **measure.surroundings(["torch", "bitsandbytes", "transformers", "safetensors"]),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
