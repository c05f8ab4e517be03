"""Speed and memory of our training step."""

import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import measure
from qlora_jax.bench.device import device_memory
from qlora_jax.bench.measure import Neighbours, PeakMemory, figure
from qlora_jax.bench.options import Step, to_tree
from qlora_jax.bench.worker import OURS
from qlora_jax.config import Config, from_tree
from qlora_jax.device import describe_devices, warn_if_gpu_idle
from qlora_jax.errors import UserError
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.manifest import git_state
from qlora_jax.models import trees
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.placement import ON_DEVICE, Placement
from qlora_jax.train.setup import load_model


class Prepared(NamedTuple):
    """What a step takes: the program's functions and their arguments."""

    program: steps.Program
    state: steps.State
    frozen: Any
    batch: dict[str, np.ndarray]
    trainable: int
    parameters: int


def run(options: Step) -> dict[str, Any]:
    """Loads, compiles and runs the step.

    Raises:
      UserError: the model cannot be opened, or a row is longer than it can read.
    """
    memory = PeakMemory()
    jax.devices()
    imported = time.perf_counter()
    prepared = prepare(options)
    program, state, frozen, batch = prepared[:4]
    jax.block_until_ready((state, frozen))
    loaded = time.perf_counter()

    start = time.perf_counter()
    gradient = program.gradient.lower(state, frozen, batch, None).compile()  # type: ignore[attr-defined]
    compiled = time.perf_counter() - start
    memory.restart()
    losses = []

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        grads, figures = gradient(state, frozen, batch, None)
        state = program.update(state, grads, figures.finite)
        jax.block_until_ready(state)
        losses.append(float(figures.loss))
        return time.perf_counter() - start

    with Neighbours() as neighbours:
        seconds = measure.take(step, options.steps)
    figures = measure.step_figures(seconds, options.batch * options.seq)
    figures |= {
        "peak memory, training": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "load": figure("s", loaded - imported),
        "compile": figure("s", compiled),
        **device_memory(),
    }
    return measure.report(
        OURS,
        ["jax", "jaxlib", "flax", "optax"],
        to_tree(options),
        figures,
        losses=losses,
        trainable=prepared.trainable,
        parameters=prepared.parameters,
        notes=list(filter(None, [warn_if_gpu_idle()])),
        others_cores=neighbours.cores,
        device=str(describe_devices()),
        git=git_state(),
    )


def prepare(options: Step, moments: Placement = ON_DEVICE) -> Prepared:
    """Loads the model and builds its step with moments there; nothing is compiled yet.

    Raises:
      UserError: the model cannot be opened, or a row is longer than it can read.
    """
    config = _config(options)
    checkpoint = open_checkpoint(config.model)
    if options.seq > checkpoint.config.max_positions:
        raise UserError(
            f"--seq {options.seq} is beyond the {checkpoint.config.max_positions} positions of "
            f"{options.model}; give that many or fewer"
        )
    model, _ = load_model(config, checkpoint, lambda line: print(line, file=sys.stderr))
    counts = trees.parameter_counts(model, config.method)
    graph, trained, frozen = trees.split(model, config.method)
    optimizer = adamw(config.optimizer, config.train.steps)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.dtype(options.dtype),
        remat=options.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=config.method == "full",
        moments=moments,
    )
    state = steps.init(trained, optimizer, options.dtype == "float16", moments)
    return Prepared(program, state, frozen, _batch(options, checkpoint.config.vocab_size), *counts)


def _config(options: Step) -> Config:
    return from_tree(
        {
            "model": {
                "path": options.model,
                "compute_dtype": options.dtype,
                "storage_dtype": options.dtype,
                "remat": options.remat,
            },
            "data": {"source": "random tokens"},
            "output": "none",
            "method": options.method,
            "lora": {"rank": options.rank, "alpha": 2 * options.rank},
            "train": {"seed": options.seed, "steps": options.steps + 1},
        },
        "options",
    )


def _batch(options: Step, vocabulary: int) -> dict[str, np.ndarray]:
    tokens, targets = measure.inputs_and_targets(
        vocabulary, options.batch, options.seq, options.seed
    )
    batch = {
        "tokens": tokens,
        "targets": targets,
        "mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(options.seq, dtype=np.int32), tokens.shape),
    }
    return {name: array[None] for name, array in batch.items()}
