"""Initial adapter values that are not random: from another adapter, or from the weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import Config, LoraConfig, ModelSettings
from qlora_jax.formats import peft
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.load import StoredWeight, read_linear, storing
from qlora_jax.formats.overlay import overlay
from qlora_jax.lora import AdapterSpec, LoraSet, LoraWeights
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.initializers.decompose import InitInput, error
from qlora_jax.models.families import EMBEDDINGS
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.train.targets import targets

S = TypeVar("S", bound=ModelSettings)

GIVEN = (
    "variant",
    "rank",
    "alpha",
    "scaling",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "init",
)
"""Settings of `lora` that the adapter in `lora.from_adapter` decides."""


def resolved(config: S) -> S:
    """Returns the config with the settings of `lora.from_adapter` filled in; unchanged without it.

    The adapter's value replaces a default. A setting that differs from both the default and the
    adapter's value is an error.

    Raises:
      UserError: the adapter cannot be read, or contradicts the config.
    """
    if config.method == "full" or config.lora.from_adapter is None:
        return config
    found = peft.read_adapter(Path(config.lora.from_adapter))
    decided = _decided(found)
    for name, value in decided.items():
        asked, default = getattr(config.lora, name), getattr(LoraConfig(), name)
        if asked not in (default, value):
            raise UserError(
                f"lora.{name} {asked!r} contradicts lora.from_adapter, which has {value!r}; remove "
                "it from the config, because the adapter decides"
            )
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, **decided))


def _decided(adapters: peft.AdapterSet) -> dict[str, Any]:
    ranks = {path: a.rank for path, a in adapters.adapters.items()}
    alphas = {path: a.alpha for path, a in adapters.adapters.items()}
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    values = {
        "variant": "dora" if adapters.dora else "lora",
        "rank": rank,
        "alpha": float(alpha),
        "scaling": adapters.scaling,
        "target_modules": sorted(ranks),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: float(a) for path, a in alphas.items() if a != alpha},
        "init": LoraConfig().init,
    }
    return {name: values[name] for name in GIVEN}


def with_replaced(config: ModelSettings, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the tensors of `lora.from_adapter` in place of its own tensors.

    Raises:
      UserError: the adapter cannot be read, or is for another model.
    """
    if config.method == "full" or config.lora.from_adapter is None:
        return checkpoint
    folder = Path(config.lora.from_adapter)
    found = peft.read_adapter(folder)
    peft.check_fits(found, checkpoint.config, folder)
    replaced = peft.replaced_tensors(found, checkpoint.config)
    return overlay(checkpoint, replaced, tied=found.replaced.one_for_both)


def given_values(config: ModelSettings, warn: Callable[[str], None]) -> LoraSet:
    """Returns the adapters of `lora.from_adapter` by module path; empty if it is not set.

    Raises:
      UserError: the adapter cannot be read.
    """
    if config.lora.from_adapter is None:
        return {}
    folder = Path(config.lora.from_adapter)
    found = peft.read_adapter(folder)
    if peft.without_effect(found.adapters):
        warn(f"warning: {folder}: A or B of every module is zero, so the adapter changes nothing")
    if found.replaced.ties and found.adapters.keys() & EMBEDDINGS:
        warn(
            f"warning: {folder}: embedding and head share one adapter (ensure_weight_tying); here "
            "each gets a copy, and training changes the two copies separately"
        )
    return found.adapters


class Splitter:
    """A hook of `formats.load.load_model` that splits each weight into a base and adapter values.

    Attributes:
      values: initial adapter values, by module path.
      errors: two relative errors by module path, in the Frobenius norm: that of base plus adapter,
        and that of the weight stored without an adapter.
    """

    def __init__(self, lora: LoraConfig, specs: Mapping[str, AdapterSpec]):
        self.lora = lora
        self.specs = specs
        self.values: dict[str, LoraWeights] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def task(
        self, path: str, w: jax.Array, store: Callable[[jax.Array], StoredWeight]
    ) -> InitInput | None:
        """Returns the input of the initializer for a linear; None if the linear has no adapter."""
        spec = self.specs.get(path)
        if spec is None:
            return None
        dtype = jnp.dtype(self.lora.dtype)
        return InitInput(w, spec, dtype, store, self.lora.loftq_iterations)

    def __call__(
        self, path: str, w: jax.Array, store: Callable[[jax.Array], StoredWeight]
    ) -> StoredWeight:
        task = self.task(path, w, store)
        if task is None:
            return store(w)
        stored, adapter = INITIALIZERS[self.lora.init](task)
        self.values[path] = _on_host(adapter)
        self.errors[path] = error(w, stored, adapter), error(w, store(w), None)
        return stored

    def report(self, say: Callable[[str], None]) -> None:
        """Reports the error of base plus adapters against the pretrained weights.

        Base plus adapter are not bit-identical to the weight, because the two parts are rounded
        separately. But the base part is no harder to store than the whole weight. So the error must
        not exceed twice the error of the weight stored alone, plus 1e-4 for float32 rounding; a
        larger error is a bug.

        Raises:
          RunFailed: an error exceeds this limit.
        """
        for path, (with_adapter, alone) in self.errors.items():
            if not with_adapter <= 2 * alone + 1e-4:
                raise RunFailed(
                    f"{path}: lora.init {self.lora.init} differs from the weight by "
                    f"{with_adapter:.2e}, storing it without adapter by {alone:.2e}; this is a "
                    "bug, please report it"
                )
        squares = [math.sqrt(sum(e**2 for e in es) / len(es)) for es in zip(*self.errors.values())]
        say(
            f"{self.lora.init}: base and adapters differ from the pretrained weights by "
            f"{squares[0]:.2e} (relative, root mean square over {len(self.errors)} linears); "
            f"stored without adapters {squares[1]:.2e}"
        )


def split_values(config: Config, checkpoint: Checkpoint) -> LoraSet:
    """Computes the initial adapter values of a run again, from the pretrained weights.

    Reads one weight at a time, and never loads the whole model.
    """
    specs, quant = targets(config.lora, checkpoint.config), config.quant
    splitter = Splitter(config.lora, specs)
    values = {}
    for path in specs:
        name = f"{path}.weight"
        store = storing(
            name,
            quant if config.method == "qlora" else None,
            jnp.dtype(config.model.storage_dtype),
        )
        if task := splitter.task(path, read_linear(checkpoint, name), store):
            _, adapter = INITIALIZERS[config.lora.init](task)
            values[path] = _on_host(adapter)
    return values


def _on_host(adapter: LoraWeights) -> LoraWeights:
    return adapter._replace(a=np.asarray(adapter.a), b=np.asarray(adapter.b))
