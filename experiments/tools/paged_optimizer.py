"""Measures the memory peak of a batch with one long sequence, for which paged optimizers exist.

Question: how much device memory do moments in host memory save at a long sequence, and what do they
  cost? (QLoRA, section 3: paged optimizers)
Expected: on a T4, the peak of a 7B model's step of 4096 tokens is lower by the size of all moments,
  1.2 GiB; no bit of the result depends on the place of the moments.
Cost: about 5 minutes on 2 CPU cores. The plan needs the extra `gpu-check`; without the extra, the
  plan is omitted.
Command: python -m experiments.tools.paged_optimizer [--out docs/results/paged_optimizer]
  Writes OUT.json and OUT.png.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tools import program
from qlora_jax.runtime import compilation, hugepages
from qlora_jax.runtime.atomic import write_text

LENGTHS = (256, 256, 256, 1024, 256, 256, 256, 256)
"""Tokens of the steps on this machine; steps on the GPU have `TIMES` times as many."""

TIMES = 4
MODEL, PLANNED, GPU = "random-smollm2-135m", "llama-7b", "t4"
GIB = 2**30


def on_the_gpu() -> dict[str, list[float]] | None:
    """Plans the device GiB of each step, by the place of the moments; None without the compiler."""
    from qlora_jax.commands import plan as command
    from qlora_jax.gpu.compile import has_plugin
    from qlora_jax.gpu.described import read_gpu
    from qlora_jax.models.shapes import find
    from qlora_jax.plan.plan import planned

    if not has_plugin():
        return None
    found: dict[tuple[str, int], float] = {}
    for offload in ("device", "host"):
        for length in sorted(set(LENGTHS)):
            settings = {
                "optimizer.offload": offload,
                "data.sequence_length": str(TIMES * length),
            }
            config = command.of_model(PLANNED, settings)
            config = command.suited(config, read_gpu(GPU).capability)
            plan = planned(config, find(PLANNED), GPU, lambda line: None, [])["plan"]
            found[offload, length] = plan.device / GIB
    return {home: [found[home, length] for length in LENGTHS] for home in ("device", "host")}


def here(home: str, steps: int) -> dict[str, Any]:
    """Runs steps on this machine; returns peak MiB and milliseconds of each, and a digest.

    Args:
      home: place of the moments, "device" or "host".
      steps: number of steps; their lengths repeat `LENGTHS`.
    """
    import jax

    from qlora_jax.bench import step as bench
    from qlora_jax.bench.measure import PeakMemory
    from qlora_jax.bench.options import StepOptions
    from qlora_jax.commands.bench import with_model
    from qlora_jax.models import trees
    from qlora_jax.quant import nbytes
    from qlora_jax.train import step as train

    chosen = with_model(
        StepOptions(MODEL, rank=64, batch=1, remat="full", offload=home), False, print
    )
    assert isinstance(chosen, StepOptions)
    program, state, frozen = bench.prepare(chosen)[:3]
    memory, random = PeakMemory(), np.random.default_rng(0)
    rows: list[dict[str, float | None]] = []
    for i in range(steps):
        length = LENGTHS[i % len(LENGTHS)]
        batch = _batch(random, length)
        memory.restart()
        start = time.perf_counter()
        grads, figures = program.gradient(state, frozen, batch, None)
        jax.block_until_ready(grads)
        middle = time.perf_counter()
        state = jax.block_until_ready(program.update(state, grads, figures.finite))
        del grads
        rows.append(
            {
                "tokens": length,
                "peak_mib": memory.phase(),
                "gradient_ms": 1e3 * (middle - start),
                "update_ms": 1e3 * (time.perf_counter() - middle),
                "loss": float(figures.loss),
            }
        )
    digest = hashlib.sha256()
    for path, leaf in trees.flatten(train.TrainState(*state)).items():
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    moved = 2 * nbytes(state.optimizer) / 2**20 if home == "host" else 0
    return {"steps": rows, "moved_mib_per_step": moved, "sha256": digest.hexdigest()}


def _batch(random: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    """Returns one micro-batch of one row of random tokens."""
    tokens = random.integers(0, 49152, (1, 1, length + 1)).astype(np.int32)
    ones = np.ones((1, 1, length), np.int32)
    return {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "mask": ones > 0,
        "segments": ones,
        "positions": np.arange(length, dtype=np.int32)[None, None],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the memory over steps: planned for the GPU, and measured here."""
    import matplotlib.figure

    plans, runs = result["planned"], result["measured"]
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    count = len(LENGTHS)
    for home, values in (plans or {}).items():
        left.step(range(1, count + 1), values, where="mid", label=f"moments on the {home}")
    left.set_title(f"{PLANNED} on a {GPU}: compiled for, not run on", fontsize=10)
    left.set_ylabel("GiB on the device")
    for home, run in runs.items():
        peaks = [row["peak_mib"] for row in run["steps"][:count]]
        right.step(range(1, count + 1), peaks, where="mid", label=f"moments on the {home}")
    right.set_title("SmolLM2-135M on this CPU", fontsize=10)
    right.set_ylabel("peak resident MiB")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("paged_optimizer"))
    options = parser.parse_args()
    # this measures resident memory, so it uses the CPU even if there is a GPU
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    hugepages.restart()
    compilation.use_wide_vectors()
    result: dict[str, Any] = {"lengths": LENGTHS, "planned": on_the_gpu(), "measured": {}}
    for home in ("device", "host"):
        print(f"{options.steps} steps, moments on the {home}", file=sys.stderr, flush=True)
        result["measured"][home] = here(home, options.steps)
    device, host = (result["measured"][home] for home in ("device", "host"))
    same = device["sha256"] == host["sha256"]
    result["equal"] = same
    print("| step | tokens | planned GiB, device / host | peak MiB | gradient ms | update ms |")
    print("|---|---|---|---|---|---|")
    for i, (a, b) in enumerate(zip(device["steps"], host["steps"])):
        plans = result["planned"]
        place = i % len(LENGTHS)
        plan = f"{plans['device'][place]:.2f} / {plans['host'][place]:.2f}" if plans else ""
        figures = (f"{a[k]:.0f} / {b[k]:.0f}" for k in ("peak_mib", "gradient_ms", "update_ms"))
        if i < len(LENGTHS):
            print(f"| {i + 1} | {a['tokens']} | {plan} | {' | '.join(figures)} |")
    print(f"moved a step: {host['moved_mib_per_step']:.1f} MiB")
    print(f"state after {options.steps} steps: {'equal' if same else 'NOT equal'} to the bit")
    write_text(options.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"))
    return 0 if same else 1


if __name__ == "__main__":
    program.run(main)
