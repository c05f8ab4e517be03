"""Adapters that start from their weight's own values, by the name in `lora.init`.

Such a start takes a part of W into the adapter, and what is stored is the rest. So the adapted
model starts near the pretrained one, not at it: the two parts are rounded on their own.
"""

from collections.abc import Callable, Mapping

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight
from qlora_jax.lora.initializers.loftq import loftq
from qlora_jax.lora.initializers.pissa import pissa
from qlora_jax.lora.weights import LoraWeights

Initializer = Callable[[InitInput], tuple[StoredWeight, LoraWeights]]

INITIALIZERS: Mapping[str, Initializer] = {"pissa": pissa, "loftq": loftq}
"""Name to what splits a weight into what is stored and an adapter."""
