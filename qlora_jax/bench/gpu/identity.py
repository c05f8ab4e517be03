"""Checks that new adapters change no product, also if XLA tunes products freely.

Every run with new adapters makes the same check before it trains.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.bench import random_codes
from qlora_jax.bench.gpu.curves import TINY
from qlora_jax.bench.gpu.lane import HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, compile_all, usable
from qlora_jax.config import Config, from_tree
from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.models.shapes import find
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.train.identity import first_changed, tolerance_of, unchanged

LAYERS = 4


class IdentityCase(NamedTuple):
    """One variant of adapter on the base of one method, in one compute dtype."""

    method: str
    variant: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.variant} on a base of method {self.method}, {self.dtype}"


CASES = tuple(
    IdentityCase(method, variant, dtype)
    for dtype in ("bfloat16", "float32", "float16")
    for method in ("qlora", "lora")
    for variant in ("lora", "dora")
)


def decoder(scale: str) -> DecoderConfig:
    """Returns the model's shapes: four layers of a 7B model, or a tiny one."""
    if scale == REHEARSAL:
        return from_hugging_face(TINY, "tiny")
    whole = find("llama-7b")
    return dataclasses.replace(whole, num_layers=LAYERS, windows=whole.windows[:LAYERS])


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [case.name for case in CASES]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the program of every case."""
    for case in CASES:
        config = _config(case)
        model = abstract_model(config, decoder(scale), None)
        function = functools.partial(_unchanged, model.graph, case)
        yield BenchProgram(case.name, function, (model.trained, model.frozen))


def run(lane: PartContext) -> None:
    """Checks every case; the programs are compiled in parallel."""
    device = jax.devices()[0]
    made = compile_all(programs(lane.scale, device), lambda: lane.left() > 5)
    for case, outcome in zip(CASES, made):
        if lane.due(4, case.name):
            with lane.guard(case.name, within=HANGS):
                model = random_codes.random_model(_config(case), decoder(lane.scale), None)
                same = usable(outcome)(model.trained, model.frozen)
                changed = first_changed(nnx.merge(*model), jax.device_get(same))
                lane.record.check(case.name, changed is None, first_changed=changed)


def _unchanged(graph: Any, case: IdentityCase, trained: Any, frozen: Any) -> Any:
    return unchanged(graph, trained, frozen, jnp.dtype(case.dtype), tolerance_of(case.variant))


def _config(case: IdentityCase) -> Config:
    tree: Mapping[str, Any] = {
        "method": case.method,
        "model": {"path": "none", "compute_dtype": case.dtype, "storage_dtype": "bfloat16"},
        "data": {"source": "none"},
        "output": "none",
        "lora": {"rank": 16, "alpha": 32, "variant": case.variant},
    }
    return from_tree(tree, "identity")
