"""Measures speed and memory of greedy generation by transformers with bitsandbytes' NF4."""

import time
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from qlora_jax.bench import measure
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import GenerateOptions, to_tree
from qlora_jax.bench.peers.torch_model import DEVICE, device_memory, load_base, synchronize


class Clock(StoppingCriteria):
    """A stopping criterion that never stops, and records the time of each token."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seen: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        synchronize()
        self.seen.append(time.perf_counter() - self.began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run(options: GenerateOptions) -> dict[str, Any]:
    """Loads the model and times repeated answers to the same random prompts."""
    memory = PeakMemory()
    start = time.perf_counter()
    model: Any = load_base(options.model, getattr(torch, options.dtype), quantized=True).eval()
    loaded = time.perf_counter() - start
    shape = (options.rows, options.prompt)
    prompts = measure.random_tokens(model.config.vocab_size, shape, options.seed)
    tokens = torch.from_numpy(prompts).long().to(DEVICE)

    def answer() -> tuple[list[int], list[float]]:
        clock = Clock()
        ids = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=options.tokens,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return ids[0, options.prompt :].tolist(), clock.seen

    ids, first = answer()
    memory.restart()
    with OtherProcesses() as neighbours:
        answers = [answer() for _ in range(options.samples)]
    times = [(seen[0], seen[-1]) for _, seen in answers]
    figures = measure.answer_figures(times, len(ids), options.rows)
    figures |= {
        "peak memory, answering": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "load": figure("s", loaded),
        "first answer": figure("s", first[-1]),
        **device_memory(),
    }
    return measure.report(
        "bitsandbytes + transformers",
        ["torch", "bitsandbytes", "transformers"],
        to_tree(options),
        figures,
        ids=ids,
        others_cores=neighbours.cores,
    )
