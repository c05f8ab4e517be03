"""Measures speed and memory of our training step."""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx

from qlora_jax.bench import measure
from qlora_jax.bench.device import device_memory
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import StepOptions, to_tree
from qlora_jax.bench.random_codes import random_model
from qlora_jax.bench.worker import OURS
from qlora_jax.config import Config, from_tree
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.kernels.select import choose_kernel
from qlora_jax.models import shapes, trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.plan import compiled_memory, fit
from qlora_jax.quant import nbytes
from qlora_jax.runtime import compilation
from qlora_jax.runtime.device import describe_devices, warn_if_gpu_idle
from qlora_jax.runtime.errors import FULL_MEMORY, UserError, first_line
from qlora_jax.runtime.manifest import git_state
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import assemble
from qlora_jax.train.setup import load_run_model
from qlora_jax.train.state import TrainState

UPDATES = 3
"""Largest number of updates that are timed alone."""


class PreparedStep(NamedTuple):
    """The functions of a training step, their arguments, and the numbers of parameters."""

    program: steps.StepProgram
    state: TrainState
    frozen: Any
    batch: dict[str, np.ndarray]
    trainable: int
    parameters: int


def run(options: StepOptions) -> dict[str, Any]:
    """Loads the model or makes a random one, compiles the step and runs it.

    Raises:
      UserError: the model cannot be opened, a row is longer than the model can read, or the device
        has too little memory.
    """
    if options.model in shapes.SHAPES:
        options = dataclasses.replace(options, shape=shapes.config_json(options.model))
    try:
        return _measured(options)
    except jax.errors.JaxRuntimeError as e:
        if FULL_MEMORY not in str(e):
            raise
        raise UserError(
            f"{options.model}: does not fit on {describe_devices()} ({first_line(e)}); give "
            "--offload host, --remat full, or smaller values of --batch, --seq and --rank"
        ) from None


def _measured(options: StepOptions) -> dict[str, Any]:
    memory = PeakMemory()
    jax.devices()
    imported = time.perf_counter()
    prepared = prepare(options)
    program, state, frozen, batch = prepared[:4]
    jax.block_until_ready((state, frozen))
    loaded = time.perf_counter()
    gradient = compiled_gradient(prepared)
    compiled = time.perf_counter() - loaded
    planned = planned_bytes(prepared, gradient, options.offload)
    moments = nbytes(state.optimizer)
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

    def update() -> float:
        nonlocal state
        grads, figures = jax.block_until_ready(gradient(state, frozen, batch, None))
        start = time.perf_counter()
        state = jax.block_until_ready(program.update(state, grads, figures.finite))
        return time.perf_counter() - start

    with OtherProcesses() as neighbours:
        seconds = measure.take(step, options.steps)
        # Timed apart from the steps, which do not wait between the gradient and the update.
        updates = [update() for _ in range(min(options.steps, UPDATES))]
    figures = measure.step_figures(seconds, options.batch * options.seq)
    figures |= {
        "update": measure.median_ms(updates),
        "peak memory, training": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "moments": figure("MiB", moments / 2**20),
        "load" if options.shape is None else "make": figure("s", loaded - imported),
        "compile": figure("s", compiled),
        **({} if planned is None else {"planned, device": figure("MiB", planned / 2**20)}),
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


def prepare(options: StepOptions) -> PreparedStep:
    """Loads the model or makes a random one, and builds its step without compiling it.

    Raises:
      UserError: the model cannot be opened, or a row is longer than the model can read.
      RunFailed: the kernel that the options name gives wrong results on this device.
    """
    config = config_of(options)
    model = _model(config, options)
    counts = trees.parameter_counts(model, config.method)
    parts = trees.split(model, config.method)
    training = assemble(config, parts)
    batch = _batch(options, model.config.vocab_size)
    return PreparedStep(training.program, training.state, training.frozen, batch, *counts)


def compiled_gradient(prepared: PreparedStep) -> Callable[..., Any]:
    """Returns the compiled gradient; the programs of single layers run once to be compiled."""
    program, *arguments = prepared[:4]
    if program.layer_programs is None:
        whole = cast(jax.stages.Wrapped, program.gradient)
        return whole.lower(*arguments, None).compile()
    jax.block_until_ready(program.gradient(*arguments, None))
    return program.gradient


def planned_bytes(prepared: PreparedStep, gradient: Callable[..., Any], offload: str) -> int | None:
    """Returns a step's peak device memory by the compiler, in bytes; None if it reports none.

    Args:
      prepared: prepared step.
      gradient: result of `compiled_gradient`.
      offload: place of the moments, device or host.
    """
    whole = gradient if isinstance(gradient, jax.stages.Compiled) else None
    if whole is not None and whole.memory_analysis() is None:
        return None
    # Drop the moments' memory kind: while a layer is updated, its moments are on the device.
    state, frozen, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), prepared[1:4]
    )
    step = compiled_memory.step_of(prepared.program, state, frozen, batch, None)

    def compiled(*arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
        return whole or fit.compiled(*arguments, donate=donate)

    gradients = compiled_memory.gradient_memory(step, compiled)
    updates = compiled_memory.update_memory(step, fit.compiled)
    _, programs = compiled_memory.place_moments(step, offload, gradients, updates, 0)
    return max(program.device for program in programs)


def _model(config: Config, options: StepOptions) -> Decoder:
    if options.model in shapes.SHAPES:
        decoder = shapes.SHAPES[options.model]
        check_length(options, decoder)
        compilation.give_memory_back()
        kernel = choose_kernel(config, jax.devices()[0])
        return nnx.merge(*random_model(config, decoder, kernel))
    checkpoint = open_checkpoint(config.model)
    check_length(options, checkpoint.config)
    return load_run_model(config, checkpoint, _say)[0]


def check_length(options: StepOptions, decoder: DecoderConfig) -> None:
    """Raises UserError if rows are longer than the model can read."""
    if options.seq > decoder.longest:
        raise UserError(
            f"--seq {options.seq} is beyond the {decoder.longest} positions of "
            f"{options.model}; give that many or fewer"
        )


def config_of(options: StepOptions) -> Config:
    """Returns the config of the run whose step is measured."""
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
            "kernels": {"implementation": options.kernel},
            "optimizer": {"offload": options.offload},
            "lora": {
                "rank": options.rank,
                "alpha": options.lora_alpha,
                "target_modules": list(options.target_modules) or "all-linear",
            },
            "train": {"seed": options.seed, "steps": options.steps + UPDATES + 1},
        },
        "options",
    )


def _batch(options: StepOptions, vocabulary: int) -> dict[str, np.ndarray]:
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


def _say(line: str) -> None:
    print(line, file=sys.stderr)
