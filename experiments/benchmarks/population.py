"""Compares K adapters trained as one population, as K runs of ours, and as runs of PEFT.

Question: how much time does one program that trains K adapters save, compared with K runs that each
  start, load and compile?
Expected: a population of 8 takes at most two thirds of the time of 8 runs of ours; a population of
  four ranks takes at most 40% of the time of four runs of PEFT.
Cost: at SmolLM2-135M's shape, 1 x 128 tokens and 10 steps, about 15 minutes on 2 CPU cores.
Command: python -m experiments.benchmarks.population [--members 2,4,8] [--peer PYTHON] [--rounds 3]
    [--model random-smollm2-135m] [--json FILE]
  --many 1000 --at-a-time 50 trains 1000 adapters on a random model of 1M parameters, 50 at a time.

Every figure covers whole processes. compile_s covers only the gradient for runs, and every program
for populations. The ranks repeat 4, 8, 16, 32; every step has the same random tokens, as in
`qlora-jax bench step`. The table shows medians of the rounds; a share compares within one round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.bench import measure, random_models, tools
from qlora_jax.bench.options import StepOptions
from qlora_jax.commands.bench import with_model
from qlora_jax.runtime.atomic import write_text
from qlora_jax.sweep import markdown

MODULE = "experiments.benchmarks.population"
"""Name of this module, which the worker's process runs."""

RANKS = (4, 8, 16, 32)
FIGURES = ("wall_s", "compile_s", "peak_mib", "share")
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""Config of a model with 1,016,960 weights, norms included."""


def runs(tool: tools.Tool, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Measures `count` runs of a tool, one after another: total time and largest peak memory."""
    began, reports = time.perf_counter(), []
    for i in range(count):
        step = StepOptions(
            options.model,
            batch=options.batch,
            seq=options.seq,
            rank=RANKS[i % len(RANKS)],
            steps=options.steps - 1,  # the benchmark adds one step to warm up
        )
        reports.append(tools.measured(tool, "step", step, _say))
    compiled = [r["figures"].get("compile", {}).get("value") for r in reports]
    return {
        "side": f"{count} runs of {tool.name}",
        "wall_s": time.perf_counter() - began,
        "compile_s": None if None in compiled else sum(compiled),
        "peak_mib": max(r["figures"]["peak memory"]["value"] for r in reports),
        "losses": [r["losses"][-1] for r in reports],
    }


def population(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Measures `count` adapters in populations of one program, in a separate process."""
    own = {k: v for k, v in vars(options).items() if k in ("model", "batch", "seq", "steps")}
    own |= {"count": count, "at_a_time": options.at_a_time or count}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "--worker", json.dumps(own)],
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        "side": f"a population of {count}",
        "wall_s": time.perf_counter() - began,
        **report,
    }


def worker(model: str, batch: int, seq: int, steps: int, count: int, at_a_time: int) -> None:
    """Trains a population and prints its figures."""
    from qlora_jax.runtime import compilation, hugepages

    hugepages.restart()
    compilation.use_wide_vectors()
    import jax

    from qlora_jax.config import from_tree
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.train import mapped, population
    from qlora_jax.train.setup import load_run_model

    memory = measure.PeakMemory()
    compiled: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == compilation.COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    config = from_tree(
        {
            "model": {"path": model},
            "data": {"source": "random tokens"},
            "output": "none",
            "train": {"steps": steps},
        },
        "options",
    )
    ranks = [RANKS[i % len(RANKS)] for i in range(count)]
    members = [
        {"lora.rank": str(r), "lora.alpha": str(2 * r), "train.seed": str(i // len(RANKS))}
        for i, r in enumerate(ranks)
    ]
    configs = population.member_configs(config, members)
    checkpoint = open_checkpoint(config.model)
    loaded, _ = load_run_model(config, checkpoint, _say)
    common = mapped.union(loaded, configs)
    rows = _batches(checkpoint.config.vocab_size, batch, seq)
    program, losses = None, []
    for start in range(0, count, at_a_time):
        part = configs[start : start + at_a_time]
        adapters = mapped.draw(loaded, part, common)
        program = program or mapped.build(config, adapters)
        found = population.run(part, adapters, rows, [], program)
        losses += [result.losses[-1] for result in found]
    print(json.dumps({"compile_s": sum(compiled), "peak_mib": memory.process(), "losses": losses}))


def _batches(vocabulary: int, batch: int, seq: int) -> Iterator[dict[str, np.ndarray]]:
    tokens, targets = measure.inputs_and_targets(vocabulary, batch, seq, 0)
    rows = {
        "tokens": tokens,
        "targets": targets,
        "mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), tokens.shape),
    }
    while True:
        yield {name: array[None] for name, array in rows.items()}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every side in turn; a population has its share of the time of as many runs."""
    model = with_model(StepOptions(options.model), bool(options.peer), _say)
    assert isinstance(model, StepOptions)
    options.model = model.model
    rows = []
    for count in options.members:
        alone, together = runs(tools.ours(), options, count), population(options, count)
        rows += [alone, together | {"share": together["wall_s"] / alone["wall_s"]}]
    for python in options.peer:
        for tool in tools.peers(python, "step"):
            theirs, ours = runs(tool, options, len(RANKS)), population(options, len(RANKS))
            rows += [theirs, ours | {"share": ours["wall_s"] / theirs["wall_s"]}]
    return rows


def medians(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns one row per side: the median of each figure over the rounds."""
    found = []
    for same in zip(*rounds):
        row = {"side": same[0]["side"]}
        for name in FIGURES:
            values = [r[name] for r in same if r.get(name) is not None]
            row |= {name: statistics.median(values)} if values else {}
        found.append(row)
    return found


def many(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains `--many` adapters on the model of 1M parameters, in populations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        random_models.write(path, {**random_models.COMMON, **SMALL})
        options.model = str(path)
        return [population(options, options.many)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=_numbers, default=[2, 4, 8], metavar="2,4,8")
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--model", default="random-smollm2-135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--many", type=int, metavar="N")
    parser.add_argument("--at-a-time", type=int, metavar="N", help="members of a population")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(**options.worker)
        return
    measured: Callable[[argparse.Namespace], list[dict[str, Any]]] = (
        many if options.many else compare
    )
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measured(options))
        if options.json is not None:
            write_text(options.json, json.dumps(rounds, indent=1) + "\n")
    print(markdown(medians(rounds), ["side", *FIGURES]))


if __name__ == "__main__":
    main()
