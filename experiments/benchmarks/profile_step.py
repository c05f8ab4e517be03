"""Lists the ten operations that take most of a training step, from XLA's own trace.

Command: python -m experiments.benchmarks.profile_step MODEL [--dtype bfloat16 --remat dots ...]
Expected: matrix products first, then the decoding of the weights.
Cost: a minute at SmolLM2-135M's shape on 2 CPU cores.
"""

import argparse
import collections
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from qlora_jax.bench.options import StepOptions
from qlora_jax.commands.bench import options_of, step_arguments, with_model
from qlora_jax.runtime import compilation, hugepages
from qlora_jax.runtime.errors import UserError

HOLDS_OTHERS = ("while", "call", "conditional")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    step_arguments(parser)
    parser.add_argument("--top", type=int, default=10, help="operations to list")
    parser.add_argument("--json", action="store_true")
    hugepages.restart()
    compilation.use_wide_vectors()
    options = parser.parse_args(namespace=argparse.Namespace(what="step"))
    step = with_model(options_of(options), False, print)

    import jax

    from qlora_jax.bench.step import prepare

    assert isinstance(step, StepOptions)
    program, state, frozen, batch = prepare(step)[:4]
    if program.layer_programs is not None:
        raise UserError(f"--remat {step.remat} compiles one program per layer; give none or dots")
    jitted = cast(jax.stages.Wrapped, program.gradient)
    gradient = jitted.lower(state, frozen, batch, None).compile()
    made = origins(gradient.as_text() or "")
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
        print(json.dumps(figures | {"jax": jax.__version__}))
        return
    print(f"gradient: {1e3 * wall:.0f} ms, {total / options.steps:.0f} ms summed over threads")
    print("| ms a step | operation | result | from |\n| --- | --- | --- | --- |")
    for name, ms in rows:
        result, origin = made[name]
        print(f"| {ms:.1f} | {name} | {result} | {origin} |")


def origins(program: str) -> dict[str, tuple[str, str]]:
    """Returns the operations of a compiled program that contain no other operations.

    Returns:
      Name of each operation to the type of its result and the end of its JAX name.
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


def durations(profile: Any, names: set[str]) -> collections.Counter[str]:
    """Returns the milliseconds of each operation, summed over threads."""
    spent: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.removeprefix("end: ")
                if name in names:
                    spent[name] += event.duration_ns / 1e6
    return spent


if __name__ == "__main__":
    main()
