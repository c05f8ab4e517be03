"""Compares the losses of 50 steps on the same data between the implementations.

The distance of a curve is its mean absolute difference from the losses of a float32 run. A curve is
right if its distance is at most twice that of decoded weights and 16-bit GEMMs, plus `FLOOR`.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.bench import random_codes
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.products import PLAIN, interpreted, reason_to_skip
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.bench.gpu.reference import FACTOR
from qlora_jax.config import Config, from_tree
from qlora_jax.data.packing import DTYPES
from qlora_jax.kernels.select import FUSED
from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.models.shapes import find
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.train.assemble import assemble

FLOOR = 0.005
"""Nats added to the limit, because bfloat16 may be very near to float32 by chance."""

PERIOD = 17
"""Number of tokens after which a row repeats."""

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


class Sizes(NamedTuple):
    """The shapes of the model, the rows and tokens of a batch, and the number of steps."""

    decoder: DecoderConfig
    batch: int
    seq: int
    steps: int


SIZES = {
    FULL: Sizes(find("smollm2-135m"), 2, 256, 50),
    REHEARSAL: Sizes(from_hugging_face(TINY, "tiny"), 2, 32, 6),
}
FIELDS = ("distance", "loss falls")


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [f"{name}: {field}" for name in (PLAIN, *FUSED) for field in FIELDS]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the gradient programs of each implementation and of the float32 run; updates."""
    for name in (PLAIN, *FUSED):
        if not reason_to_skip(name, scale, device):
            yield _gradient(f"{name}: gradient", _step(scale, name, "bfloat16"))
    exact = _step(scale, PLAIN, "float32")
    yield _gradient("float32: gradient", exact, "highest")
    for name, update, arguments in compiled_memory.layer_updates(exact):
        yield BenchProgram(name, update, arguments, donate=(0, 3))


def run(lane: PartContext) -> None:
    """Trains with each implementation and compares the losses."""
    device, curve = jax.devices()[0], functools.partial(losses, lane.scale)
    with interpreted(lane), lane.guard(*names(lane.scale)):
        with jax.default_matmul_precision("highest"):
            exact = curve(PLAIN, "float32")
        own = curve(PLAIN, "bfloat16")
        limit = FACTOR * _distance(own, exact) + FLOOR
        for name in (PLAIN, *FUSED):
            fields = [f"{name}: {field}" for field in FIELDS]
            if reason := reason_to_skip(name, lane.scale, device):
                for field in fields:
                    lane.record.absent(field, reason)
            elif lane.due(8, *fields):
                with lane.guard(*fields):
                    got = own if name == PLAIN else curve(name, "bfloat16")
                    _compare(lane, fields, got, exact, limit)


def losses(scale: str, implementation: str, dtype: str) -> list[float]:
    """Trains and returns the loss of each step; weights and data are the same at each call."""
    size, config = SIZES[scale], _config(scale, dtype)
    model = random_codes.random_model(config, size.decoder, implementation)
    program, state, frozen = assemble(config, model)[1:]
    found, rows = [], batch(scale)
    for _ in range(size.steps):
        grads, figures = program.gradient(state, frozen, rows, None)
        state = program.update(state, grads, figures.finite)
        found.append(figures.loss)
    return [float(loss) for loss in found]


def batch(scale: str) -> dict[str, np.ndarray]:
    """Returns the batch of every step, always the same; its rows repeat after `PERIOD` tokens."""
    size = SIZES[scale]
    source = np.random.default_rng(0)
    word = source.integers(0, size.decoder.vocab_size, (size.batch, PERIOD), dtype=np.int32)
    tokens = np.resize(np.tile(word, (1, size.seq // PERIOD + 2)), (size.batch, size.seq + 1))
    one = np.ones((size.batch, size.seq), np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": one.astype(bool),
        "segments": one,
        "positions": one * np.arange(size.seq, dtype=np.int32),
    }
    return {name: rows[name][None] for name in DTYPES}


def _config(scale: str, dtype: str) -> Config:
    return from_tree(
        {
            "model": {"path": "none", "compute_dtype": dtype, "storage_dtype": "bfloat16"},
            "data": {"source": "none"},
            "output": "none",
            "lora": {"rank": 16, "alpha": 32},
            "optimizer": {"learning_rate": 2e-3},
            "train": {"steps": SIZES[scale].steps},
        },
        "curves",
    )


def _step(scale: str, implementation: str, dtype: str) -> compiled_memory.AbstractStep:
    config = _config(scale, dtype)
    model = abstract_model(config, SIZES[scale].decoder, implementation)
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(scale).items()}
    return compiled_memory.step_of(*assemble(config, model)[1:], rows, None)


def _gradient(
    name: str, step: compiled_memory.AbstractStep, precision: str | None = None
) -> BenchProgram:
    def gradient(*arguments: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return step.program.gradient(*arguments)

    arguments = (step.state._replace(optimizer=()), step.frozen, step.batch, step.key)
    return BenchProgram(name, gradient, arguments)


def _distance(curve: list[float], exact: list[float]) -> float:
    return float(np.mean(np.abs(np.subtract(curve, exact))))


def _compare(
    lane: PartContext, fields: list[str], got: list[float], exact: list[float], limit: float
) -> None:
    distance, part = _distance(got, exact), max(1, len(got) // 10)
    lane.record.check(
        fields[0], bool(distance <= limit), distance=distance, limit=limit, losses=got
    )
    falls = np.mean(got[-part:]) < np.mean(got[:part])
    lane.record.check(fields[1], bool(falls), first=got[0], last=got[-1], exact=exact[-1])
