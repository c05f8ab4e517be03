"""The content of an adapter folder as arrays, with A as [in, r] and B as [r, out]."""

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
"""Names of the matrices of embedding and head in all families."""


def is_within(name: str, saved: str) -> bool:
    """Returns whether a parameter belongs to a module that `modules_to_save` names.

    As in PEFT, the path of such a module ends with the name, and the name need not be a whole part
    of the path: norm also matches input_layernorm.

    Args:
      name: name of the parameter.
      saved: a name in `modules_to_save`.
    """
    modules = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(module.endswith(saved) for module in modules)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The parameters of the base that an adapter folder replaces.

    Attributes:
      tensors: Hugging Face name to value, in Hugging Face's layout.
      modules: names of the modules that were trained whole (`modules_to_save`). A matrix in
        `tensors` outside these modules is an embedding or head that was saved without training.
      bias: PEFT's setting for the trained biases: none, all, or lora_only.
      ties: whether a replaced embedding is also the head (`ensure_weight_tying`).
    """

    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    modules: tuple[str, ...] = ()
    bias: Bias = "none"
    ties: bool = False

    @property
    def one_for_both(self) -> bool:
        """Whether one replaced matrix is used for embedding and head, if the base ties them.

        PEFT loads a matrix that was saved without training into the shared matrix of both.
        """
        matrices = {name for name in self.tensors if name in MATRICES}
        trained = any(is_within(name, saved) for name in matrices for saved in self.modules)
        return self.ties or not trained


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """The content of an adapter folder.

    Attributes:
      adapters: module path to adapter.
      scaling: formula of the scale: alpha/r or alpha/sqrt(r).
      base_name: name or path of the base model in training; empty if not recorded.
      dropout: dropout rate in training.
      targets: settings that choose the modules.
      replaced: parameters of the base that the folder replaces.
    """

    adapters: dict[str, LoraWeights]
    scaling: Scaling
    base_name: str
    dropout: float
    targets: Targets
    replaced: Replaced = Replaced()

    @property
    def dora(self) -> bool:
        """Whether the adapters have magnitudes (DoRA). Either all adapters have one or none."""
        return any(adapter.magnitude is not None for adapter in self.adapters.values())

    @property
    def beyond_lora(self) -> bool:
        """Whether the set holds more than plain LoRA. Then it cannot be one of several adapters."""
        return self.dora or bool(self.replaced.tensors)


def tensor_keys(path: str, dora: bool) -> dict[str, str]:
    """Returns part to tensor name in a file, for the parts A, B and, with DoRA, magnitude.

    Args:
      path: path of the module; an embedding has other names for A and B in PEFT.
      dora: whether the adapter has a magnitude.
    """
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    if path in EMBEDDINGS:
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    if dora:
        names["magnitude"] = "lora_magnitude_vector"
    return {part: f"{PREFIX}{path}.{name}" for part, name in names.items()}


def without_effect(adapters: LoraSet) -> bool:
    """Returns whether every adapter has A = 0 or B = 0, so that the output does not change."""
    return not any(np.any(adapter.a) and np.any(adapter.b) for adapter in adapters.values())


def listed(names: list[str], most: int = 12) -> str:
    """Returns the sorted names for a message: the first `most` names and the number of others."""
    names = sorted(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
