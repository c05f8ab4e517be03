"""Speed and memory of our greedy generation."""

import time
from typing import Any

import jax

from qlora_jax import compilation
from qlora_jax.bench import measure
from qlora_jax.bench.device import device_memory
from qlora_jax.bench.measure import Neighbours, PeakMemory, figure
from qlora_jax.bench.options import Generate, to_tree
from qlora_jax.bench.worker import OURS
from qlora_jax.config import ModelConfig, QuantConfig
from qlora_jax.device import describe_devices, warn_if_gpu_idle
from qlora_jax.formats.load import load
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.manifest import git_state
from qlora_jax.models.generate import generate


def run(options: Generate) -> dict[str, Any]:
    """Loads the model and answers one random prompt again and again.

    Raises:
      UserError: the model cannot be opened, or has too few positions.
    """
    compilation.give_memory_back()
    memory = PeakMemory()
    jax.devices()
    start = time.perf_counter()
    checkpoint = open_checkpoint(ModelConfig(path=options.model))
    model = load(checkpoint, quant=QuantConfig(), dtype=options.dtype)
    loaded = time.perf_counter() - start
    prompt = measure.random_tokens(checkpoint.config.vocab_size, (options.prompt,), options.seed)

    def answer() -> tuple[list[int], list[float]]:
        seen: list[float] = []
        start = time.perf_counter()
        (ids,) = generate(
            model,
            [prompt.tolist()],
            max_new_tokens=options.tokens,
            stop_ids=(),
            pad_id=0,
            dtype=options.dtype,
            on_tokens=lambda _: seen.append(time.perf_counter() - start),
        )
        return ids, seen

    ids, first = answer()
    memory.restart()
    with Neighbours() as neighbours:
        answers = [answer() for _ in range(options.samples)]
    figures = measure.answer_figures([(seen[0], seen[-1]) for _, seen in answers], options.tokens)
    figures |= {
        "peak memory, answering": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "load": figure("s", loaded),
        "first answer": figure("s", first[-1]),
        **device_memory(),
    }
    return measure.report(
        OURS,
        ["jax", "jaxlib", "flax"],
        to_tree(options),
        figures,
        ids=ids,
        notes=list(filter(None, [warn_if_gpu_idle()])),
        others_cores=neighbours.cores,
        device=str(describe_devices()),
        git=git_state(),
    )
