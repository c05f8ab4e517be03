"""Measures speed and memory of our greedy generation."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.bench import measure
from qlora_jax.bench.device import device_memory
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import GenerateOptions, to_tree
from qlora_jax.bench.random_codes import random_model
from qlora_jax.bench.worker import OURS
from qlora_jax.config import Config, ModelConfig, QuantConfig, from_tree
from qlora_jax.formats.load import load_model
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.models.decoder import Decoder, detach, use_kernel
from qlora_jax.models.generate import (
    Sampling,
    generate,
    generate_chunk,
    padded_size,
    padded_stops,
    prefill,
)
from qlora_jax.models.shapes import SHAPES
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.runtime import compilation
from qlora_jax.runtime.device import describe_devices, warn_if_gpu_idle
from qlora_jax.runtime.manifest import git_state


class PreparedGeneration(NamedTuple):
    """A model, its prompts, and the function `answer`, which generates once.

    `answer` returns the ids of each row, and the seconds from the start to each arrival of tokens.
    """

    model: Decoder
    prompts: list[list[int]]
    answer: Callable[[], tuple[list[list[int]], list[float]]]


def prepare(options: GenerateOptions) -> PreparedGeneration:
    """Loads the model or makes a random one.

    Raises:
      UserError: the model cannot be opened, or has too few positions.
    """
    if options.model in SHAPES:
        config, decoder = _config(options), SHAPES[options.model]
        model = _without_adapters(nnx.merge(*random_model(config, decoder, options.kernel)))
    else:
        checkpoint = open_checkpoint(ModelConfig(path=options.model))
        model = load_model(checkpoint, quant=QuantConfig(), dtype=options.dtype)
        use_kernel(model, options.kernel)
    shape = (options.rows, options.prompt)
    prompts = measure.random_tokens(model.config.vocab_size, shape, options.seed).tolist()

    def answer() -> tuple[list[list[int]], list[float]]:
        seen: list[float] = []
        start = time.perf_counter()
        ids = generate(
            model,
            prompts,
            max_new_tokens=options.tokens,
            stop_ids=(),
            pad_id=0,
            dtype=options.dtype,
            on_tokens=lambda _: seen.append(time.perf_counter() - start),
        )
        return ids, seen

    return PreparedGeneration(model, prompts, answer)


def run(options: GenerateOptions) -> dict[str, Any]:
    """Loads the model and times repeated answers to the same random prompts.

    Raises:
      UserError: the model cannot be opened, or has too few positions.
    """
    compilation.give_memory_back()
    memory = PeakMemory()
    jax.devices()
    start = time.perf_counter()
    answer = prepare(options).answer
    loaded = time.perf_counter() - start
    ids, first = answer()
    memory.restart()
    with OtherProcesses() as neighbours:
        answers = [answer() for _ in range(options.samples)]
    times = [(seen[0], seen[-1]) for _, seen in answers]
    figures = measure.answer_figures(times, options.tokens, options.rows)
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
        ids=ids[0],
        notes=list(filter(None, [warn_if_gpu_idle()])),
        others_cores=neighbours.cores,
        device=str(describe_devices()),
        git=git_state(),
    )


class Compilable(NamedTuple):
    """One of the two programs of a generation: its name, the function and abstract arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def programs(options: GenerateOptions) -> Iterator[Compilable]:
    """Yields the programs of `prepare(options).answer` for published shapes: prefill, decode."""
    made = abstract_model(_config(options), SHAPES[options.model], options.kernel)
    graphs: list[nnx.GraphDef] = []

    def bare(trained: Any, frozen: Any) -> nnx.State:
        graph, weights = nnx.split(_without_adapters(nnx.merge(made.graph, trained, frozen)))
        graphs.append(graph)
        return weights

    weights = jax.eval_shape(bare, made.trained, made.frozen)
    (graph,), dtype = graphs, jnp.dtype(options.dtype)
    shape = (options.rows, padded_size(options.prompt))
    slots = padded_size(options.prompt + options.tokens)
    tokens, lengths = (jax.ShapeDtypeStruct(s, jnp.int32) for s in (shape, shape[:1]))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), options.rows))
    sampling, stops = Sampling(0.0, 1.0, keys), padded_stops(())

    def read(weights: Any, tokens: Any, lengths: Any, keys: Any) -> Any:
        drawn = sampling._replace(keys=keys)
        return prefill(graph, weights, tokens, lengths, drawn, stops, slots, dtype)

    def write(weights: Any, cache: Any, rows: Any, keys: Any, steps: Any) -> Any:
        drawn = sampling._replace(keys=keys)
        return generate_chunk(graph, weights, cache, rows, drawn, stops, 0, steps, dtype)

    yield Compilable("prefill", read, (weights, tokens, lengths, keys))
    rows, cache = jax.eval_shape(read, weights, tokens, lengths, keys)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    yield Compilable("decode", write, (weights, cache, rows, keys, one))


def _without_adapters(model: Decoder) -> Decoder:
    detach(model)
    return model


def _config(options: GenerateOptions) -> Config:
    """Returns the config of a run with this model; the caller removes the adapters."""
    return from_tree(
        {
            "model": {
                "path": options.model,
                "compute_dtype": options.dtype,
                "storage_dtype": options.dtype,
            },
            "data": {"source": "none"},
            "output": "none",
            "lora": {"rank": 1},
            "train": {"seed": options.seed},
        },
        "options",
    )
