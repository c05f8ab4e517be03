"""The ten operations that take most of a training step, from XLA's own trace.

Command: python experiments/benchmarks/profile_step.py MODEL [--dtype bfloat16 --remat dots ...]
Expected: matrix products first; decoding the weights behind them.
Cost: a minute at SmolLM2-135M's shape on 2 CPU cores.
"""

import collections
import re
import tempfile
import time
from pathlib import Path

import measure

HOLDS_OTHERS = ("while", "call", "conditional")


def main() -> None:
    parser = measure.step_arguments(__doc__, ["dots", "none", "full"])
    parser.add_argument("--top", type=int, default=10, help="operations to list")
    options = parser.parse_args()

    import jax
    import jax.numpy as jnp
    import numpy as np

    from qlora_jax.config import from_tree
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.models import trees
    from qlora_jax.train import step as steps
    from qlora_jax.train.optimizer import adamw
    from qlora_jax.train.setup import load_model

    config = from_tree(
        {
            "model": {"path": options.model, "storage_dtype": options.dtype},
            "data": {"source": "random tokens"},
            "output": "none",
            "method": options.method,
            "lora": {"rank": options.rank, "alpha": 2 * options.rank},
        },
        "options",
    )
    checkpoint = open_checkpoint(config.model)
    model, _ = load_model(config, checkpoint, print)
    graph, trained, frozen = trees.split(model, config.method)
    optimizer = adamw(config.optimizer, 2)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.dtype(options.dtype),
        remat=options.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=config.method == "full",
    )
    state = steps.init(trained, optimizer, dynamic_scale=False)
    tokens, targets = measure.random_tokens(
        checkpoint.config.vocab_size, options.batch, options.seq, options.seed
    )
    batch = {
        "tokens": tokens,
        "targets": targets,
        "mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(options.seq, dtype=np.int32), tokens.shape),
    }
    batch = {name: array[None] for name, array in batch.items()}
    gradient = program.gradient.lower(state, frozen, batch, None).compile()
    made = origins(gradient.as_text())
    jax.block_until_ready(gradient(state, frozen, batch, None))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(options.steps):
                jax.block_until_ready(gradient(state, frozen, batch, None))
            wall = (time.perf_counter() - start) / options.steps
        (file,) = Path(folder).rglob("*.xplane.pb")
        spent = durations(jax.profiler.ProfileData.from_file(str(file)), set(made))
    total = sum(spent.values())
    rows = [(name, ms / options.steps) for name, ms in spent.most_common(options.top)]
    if options.json:
        figures = {"wall_ms": 1e3 * wall, "thread_ms": total / options.steps, "top_ms": dict(rows)}
        measure.show(figures | measure.surroundings(["jax", "jaxlib"]), True)
        return
    print(f"gradient: {1e3 * wall:.0f} ms, {total / options.steps:.0f} ms summed over threads")
    print("| ms a step | operation | result | from |\n| --- | --- | --- | --- |")
    for name, ms in rows:
        result, origin = made[name]
        print(f"| {ms:.1f} | {name} | {result} | {origin} |")


def origins(program: str) -> dict[str, tuple[str, str]]:
    """The operations of a compiled program that hold no others.

    Returns:
      Name to its result's type and the end of its JAX name.
    """
    made = {}
    for line in program.splitlines():
        if match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", line):
            if match[3] in HOLDS_OTHERS:
                continue
            name = re.search(r'op_name="([^"]*)"', line)
            parts = name[1].split("/") if name else [""]
            result = re.sub(r"\{[\d,]*\}", "", match[2])
            made[match[1]] = result[:60], "/".join(parts[-3:])
    return made


def durations(profile, names: set[str]) -> collections.Counter:
    """Milliseconds per operation, summed over threads."""
    spent: collections.Counter = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.removeprefix("end: ")
                if name in names:
                    spent[name] += event.duration_ns / 1e6
    return spent


if __name__ == "__main__":
    main()
