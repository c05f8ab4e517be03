"""What an adapter folder holds, in arrays laid out as ours."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from qlora_jax.formats.peft.targets import Targets
from qlora_jax.lora.spec import Scaling
from qlora_jax.lora.weights import LoraSet, LoraWeights
from qlora_jax.models.families import EMBEDDINGS, FAMILIES, HEAD

Bias = Literal["none", "all", "lora_only"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

MATRICES = frozenset(
    f"{module}.weight" for module in (*EMBEDDINGS, HEAD, *(f.names.head for f in FAMILIES.values()))
)
"""The names of the embedding's and of the head's matrix, in every family."""


def within(name: str, saved: str) -> bool:
    """Whether a parameter belongs to a module that `modules_to_save` names.

    The module's path ends in the name, in the middle of a word too, as PEFT takes it: norm stands
    for input_layernorm as well.
    """
    modules = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(module.endswith(saved) for module in modules)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """Parameters of the base that were trained beside the adapters.

    Attributes:
      tensors: Hugging Face names to values, in Hugging Face's layout.
      modules: names of the modules that were trained whole (`modules_to_save`); a tensor of no
        such module is an embedding or a head that was saved as it was.
      bias: which biases were trained, in PEFT's words.
      ties: whether a replaced embedding is the head as well (`ensure_weight_tying`).
    """

    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    modules: tuple[str, ...] = ()
    bias: Bias = "none"
    ties: bool = False

    @property
    def one_for_both(self) -> bool:
        """Whether one replaced matrix stands for embedding and head, where the base ties them.

        PEFT loads a matrix that was saved as it was into the one that both share.
        """
        matrices = {name for name in self.tensors if name in MATRICES}
        trained = any(within(name, saved) for name in matrices for saved in self.modules)
        return self.ties or not trained


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """What an adapter folder holds.

    Attributes:
      adapters: module paths to adapters.
      scaling: how alpha becomes the factor: alpha/r or alpha/sqrt(r).
      base_name: the name or path of the model that it was trained on, or nothing.
      dropout: the rate of dropout that it was trained with.
      targets: the settings that chose its modules.
      replaced: parameters of the base that were trained beside the adapters.
    """

    adapters: dict[str, LoraWeights]
    scaling: Scaling
    base_name: str
    dropout: float
    targets: Targets
    replaced: Replaced = Replaced()

    @property
    def dora(self) -> bool:
        """Whether the adapters have magnitudes; all or none have."""
        return any(adapter.magnitude is not None for adapter in self.adapters.values())

    @property
    def beyond_lora(self) -> bool:
        """Whether it holds more than plain LoRA, so that it cannot be one of several adapters."""
        return self.dora or bool(self.replaced.tensors)


def tensor_keys(path: str, dora: bool) -> dict[str, str]:
    """Returns the names of one module's tensors in a file: A, B and, for DoRA, magnitude.

    Args:
      path: the module's path; PEFT has other names for the A and B of an embedding.
      dora: whether there is a magnitude.
    """
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    if path in EMBEDDINGS:
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    if dora:
        names["magnitude"] = "lora_magnitude_vector"
    return {part: f"{PREFIX}{path}.{name}" for part, name in names.items()}


def without_effect(adapters: LoraSet) -> bool:
    """Whether A or B of every adapter is zero, so that they change nothing."""
    return not any(np.any(adapter.a) and np.any(adapter.b) for adapter in adapters.values())


def listed(names: list[str], most: int = 12) -> str:
    """Names for a message: sorted, and where there are many, the first of them and a count."""
    names = sorted(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
