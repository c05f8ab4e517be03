"""Measures the cost of adapters in generation: none, one, one merged, and several in one batch.

Question: how many tokens per second does a model generate without an adapter, with one, with one
  merged into its weights, and with four adapters in one batch compared with four runs of one each?
Expected: one adapter of rank 16 costs a few percent; a merged adapter costs nothing; a batch of
  eight rows with four adapters is about as fast as eight rows with one adapter, and several times
  as fast as four runs of two rows, because the batch reads the base once.
Cost: about a minute on 2 CPU cores with the small random model, which is made once (0.3 GB).
Command: python -m experiments.benchmarks.adapters [--model MODEL] [--bits 16] [--out FILE.json]
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import random_models
from qlora_jax.bench.measure import random_tokens
from qlora_jax.config import ModelConfig, QuantConfig
from qlora_jax.formats.load import load_model
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.lora import AdapterSpec, LoraSet, LoraWeights
from qlora_jax.models.adapters import attach_bank, put_adapter
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.models.generate import generate
from qlora_jax.quant import QTensor, dequantize, quantize
from qlora_jax.runtime import compilation, hugepages
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.device import describe_devices

ADAPTERS, ROWS = 4, 8
SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options of a measurement: prompts have `prompt` tokens, answers have `tokens` tokens."""

    model: str
    bits: int
    dtype: str
    rank: int
    prompt: int
    tokens: int


def updates(linears: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, LoraWeights]:
    """Returns a random adapter for every linear."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(random.normal(size=shape), np.float32)

    return {
        path: LoraWeights(
            draw(k, rank) / np.float32(k**0.5), draw(rank, n) * 0.01, SCALE * rank, SCALE
        )
        for path, (k, n) in linears.items()
    }


def with_one(model: Decoder, adapter: LoraSet, setting: Setting) -> Decoder:
    """Attaches an adapter to the model as after training; returns the model."""
    spec = AdapterSpec(setting.rank, SCALE * setting.rank, SCALE)
    attach(model, dict.fromkeys(adapter, spec), jax.random.key(0), dtype=setting.dtype)
    for run in model.runs:
        for linear in run.linears().values():
            own = [adapter[path] for path, other, _ in model.walk() if other is linear]
            assert linear.adapter is not None
            linear.adapter.a.set_value(jnp.asarray(np.stack([u.a for u in own]), setting.dtype))
            linear.adapter.b.set_value(jnp.asarray(np.stack([u.b for u in own]), setting.dtype))
    return model


def merged(model: Decoder, adapter: LoraSet) -> Decoder:
    """Adds an adapter to the model's weights, in their storage format; returns the model."""
    for run in model.runs:
        for linear in run.linears().values():
            own = [adapter[path] for path, other, _ in model.walk() if other is linear]
            change = jnp.stack([jnp.asarray(u.scale * u.a @ u.b) for u in own])
            weight = linear.weight.get_value()
            if isinstance(weight, QTensor):
                linear.weight.set_value(quantize(dequantize(weight) + change))
            else:
                linear.weight.set_value((weight + change).astype(weight.dtype))
    return model


def cases(setting: Setting) -> tuple[dict[str, Callable[[], int]], str]:
    """Returns the timed calls by name, and the device; a call returns its number of tokens."""
    checkpoint = open_checkpoint(ModelConfig(path=setting.model))
    quant = QuantConfig() if setting.bits == 4 else None

    def fresh() -> Decoder:
        return load_model(checkpoint, quant=quant, dtype=setting.dtype)

    base = fresh()
    adapters = [updates(base.linears(), setting.rank, seed) for seed in range(ADAPTERS)]
    alone = [with_one(fresh(), adapter, setting) for adapter in adapters]
    one_merged = merged(fresh(), adapters[0])
    bank = fresh()
    attach_bank(bank, slots=ADAPTERS, rank=setting.rank, dtype=setting.dtype)
    for slot, adapter in enumerate(adapters):
        put_adapter(bank, slot, adapter)
    shape = (ROWS, setting.prompt)
    prompts = random_tokens(base.config.vocab_size, shape, seed=0).tolist()

    def write(model: Decoder, rows: slice, slots: list[int] | None = None) -> int:
        answers = generate(
            model,
            prompts[rows],
            max_new_tokens=setting.tokens,
            stop_ids=(),
            pad_id=0,
            dtype=setting.dtype,
            adapters=slots,
        )
        return sum(map(len, answers))

    each = ROWS // ADAPTERS
    parts = [slice(i * each, (i + 1) * each) for i in range(ADAPTERS)]
    own = [i // each for i in range(ROWS)]
    return {
        "1 row, base": lambda: write(base, slice(1)),
        "1 row, adapter": lambda: write(alone[0], slice(1)),
        "1 row, adapter in a bank": lambda: write(bank, slice(1), [0]),
        "1 row, merged": lambda: write(one_merged, slice(1)),
        f"{ROWS} rows, base": lambda: write(base, slice(ROWS)),
        f"{ROWS} rows, 1 adapter": lambda: write(alone[0], slice(ROWS)),
        f"{ROWS} rows, {ADAPTERS} adapters, one batch": lambda: write(bank, slice(ROWS), own),
        f"{ROWS} rows, {ADAPTERS} adapters, a run each": lambda: sum(
            write(model, part) for model, part in zip(alone, parts)
        ),
    }, str(describe_devices())


def measure(runs: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Returns the tokens per second of each case in each round.

    Every round runs all cases. Each case runs once before the rounds, to compile.
    """
    for call in runs.values():
        call()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.perf_counter()
            tokens = call()
            speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def table(medians: Mapping[str, float]) -> str:
    """Formats each case as a Markdown row, with its ratio to the base with as many rows."""
    lines = ["| what | tokens/s | of the base |", "|---|---|---|"]
    for name, speed in medians.items():
        base = medians[f"{name.split(',')[0]}, base"]
        lines.append(f"| {name} | {speed:.1f} | {speed / base:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random-smollm2-135m")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=34)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    hugepages.restart()
    compilation.use_wide_vectors()
    compilation.enable_cache()
    path = options.model
    if path in random_models.SHAPES:
        path = str(random_models.folder(path, print))
    setting = Setting(
        path, options.bits, options.dtype, options.rank, options.prompt, options.tokens
    )
    runs, device = cases(setting)
    speeds = measure(runs, options.rounds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result: dict[str, Any] = {
        "setting": dataclasses.asdict(setting) | {"model": options.model},
        "device": device,
        "jax": jax.__version__,
        "tokens per second": speeds,
        "medians": medians,
    }
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if options.json else table(medians))


if __name__ == "__main__":
    main()
