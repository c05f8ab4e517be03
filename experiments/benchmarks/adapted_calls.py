"""Times calls of an NNX model: unmodified, with adapters, and with adapters on 4-bit weights.

Question: how long do the first eager call, a later eager call, compilation and a compiled call take
  for each of these models?
Expected: the first eager call compiles a small program for each kind of layer; later eager calls
  take time to split modules; in compiled calls, adapters cost their two products and 4-bit weights
  cost the decoding.
Cost: three minutes on 2 CPU cores.
Command: python -m experiments.benchmarks.adapted_calls [--shape tiny] [--rows 2] [--json]
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import qlora_jax as qj
from experiments.benchmarks.plain_llama import SHAPES, PlainLlama
from experiments.tools import program
from qlora_jax.runtime.device import describe_devices

WHERE = r"layers\..*kernel"
TIMES = 5


def plain(shape: str) -> PlainLlama:
    return PlainLlama(SHAPES[shape], nnx.Rngs(0))


def adapted(shape: str) -> PlainLlama:
    return qj.add_lora(plain(shape), WHERE, rank=16, rngs=nnx.Rngs(1))


def quantized(shape: str) -> PlainLlama:
    return qj.quantize_model(adapted(shape), WHERE)


MODELS: dict[str, Callable[[str], PlainLlama]] = {
    "unmodified": plain,
    "adapters": adapted,
    "adapters on 4 bits": quantized,
}


def seconds(call: Callable[[], jax.Array]) -> float:
    """Returns the seconds of a call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=2, metavar="N")
    parser.add_argument("--length", type=int, default=64, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    tokens = jnp.ones((options.rows, options.length), jnp.int32)
    models = {name: make(options.shape) for name, make in MODELS.items()}
    parts = {name: nnx.split(model) for name, model in models.items()}

    def compiled_of(graph: nnx.GraphDef) -> Any:
        return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))

    figures: dict[str, dict[str, float]] = {}
    compiled = {}
    for name, model in models.items():
        first = seconds(lambda model=model: model(tokens))  # type: ignore[misc]
        graph, state = parts[name]
        start = time.perf_counter()
        compiled[name] = compiled_of(graph).lower(state, tokens).compile()
        figures[name] = {"first eager call": first, "compiling": time.perf_counter() - start}
    eager: dict[str, list[float]] = {name: [] for name in models}
    quick: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMES + 1):
        for name, model in models.items():
            state = parts[name][1]
            eager[name].append(seconds(lambda model=model: model(tokens)))  # type: ignore[misc]
            run = compiled[name]
            quick[name].append(seconds(lambda run=run, state=state: run(state, tokens)))  # type: ignore[misc]
    for name in models:
        figures[name]["eager call"] = statistics.median(eager[name][1:])
        figures[name]["compiled call"] = statistics.median(quick[name][1:])
    if options.json:
        about = {"device": str(describe_devices()), "jax": jax.__version__, **vars(options)}
        print(json.dumps({**about, "seconds": figures}))
        return 0
    columns = list(figures["unmodified"])
    print(f"{'milliseconds':<20}" + "".join(f"{column:>18}" for column in columns))
    for name, row in figures.items():
        print(f"{name:<20}" + "".join(f"{1000 * row[column]:>18.1f}" for column in columns))
    return 0


if __name__ == "__main__":
    program.run(main)
