"""What an adapter folder holds, in arrays laid out as ours."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

Scaling = Literal["alpha/r", "alpha/sqrt(r)", "constant"]
Bias = Literal["none", "all", "lora_only"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapted linear: x·W becomes x·W + factor · (x·a)·b.

    `a` is [in, rank] and `b` is [rank, out], the transposes of PEFT's. Both may be padded with
    zeros to a common rank: the first `rank` columns and rows count. `alpha` becomes the factor by
    the adapter set's scaling rule. `magnitude` [out] is DoRA's.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    rank: int
    magnitude: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Replaced:
    """Parameters of the base that were trained beside the adapters.

    Attributes:
      tensors: by Hugging Face name, in Hugging Face's layout.
      modules: names of the modules that were trained whole (`modules_to_save`).
      bias: whose biases were trained.
      ties: whether a replaced embedding is the head's as well, where the base ties them.
    """

    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    modules: tuple[str, ...] = ()
    bias: Bias = "none"
    ties: bool = False


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """What an adapter folder holds. `scaling` is alpha/r or alpha/sqrt(r)."""

    adapters: dict[str, Adapter]
    scaling: Scaling
    base_name: str
    dropout: float
    replaced: Replaced = Replaced()

    @property
    def dora(self) -> bool:
        """Whether the adapters have magnitudes; all or none have."""
        return any(adapter.magnitude is not None for adapter in self.adapters.values())


def factor(adapter: Adapter, scaling: Scaling) -> float:
    """The number that multiplies b·a."""
    match scaling:
        case "alpha/r":
            return adapter.alpha / adapter.rank
        case "alpha/sqrt(r)":
            return adapter.alpha / math.sqrt(adapter.rank)
        case "constant":
            return adapter.alpha


def difference(now: Adapter, start: Adapter, scaling: Scaling) -> Adapter:
    """The adapter of twice the rank whose update is that of `now` less that of `start`.

    Both have the same rank and alpha; the magnitude is `now`'s.
    """
    if (now.rank, now.alpha) != (start.rank, start.alpha):
        raise ValueError("adapters of unlike rank or alpha")
    rank = now.rank
    a = np.concatenate([now.a[:, :rank], start.a[:, :rank]], axis=1)
    b = np.concatenate([now.b[:rank], -start.b[:rank]])
    growth = {"alpha/r": 2.0, "alpha/sqrt(r)": math.sqrt(2), "constant": 1.0}[scaling]
    return Adapter(a, b, now.alpha * growth, 2 * rank, now.magnitude)


def without_effect(adapters: Mapping[str, Adapter]) -> bool:
    """Whether every B is zero, so that the adapters change nothing."""
    return not any(np.any(adapter.b) for adapter in adapters.values())


def listed(names: list[str], most: int = 12) -> str:
    """Names for a message: sorted, and where there are many, the first of them and a count."""
    names = sorted(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
