"""Initializers that compute A and B from the pretrained weight, by the name in `lora.init`.

Such an initializer splits W into an adapter scale * A @ B and a stored weight, which together
approximate W. At first the adapted model is near the pretrained model but not equal to it, because
the stored weight, A and B are each rounded.
"""

from collections.abc import Callable, Mapping

from qlora_jax.lora.initializers.decompose import InitInput, StoredWeight
from qlora_jax.lora.initializers.loftq import loftq
from qlora_jax.lora.initializers.pissa import pissa
from qlora_jax.lora.weights import LoraWeights

Initializer = Callable[[InitInput], tuple[StoredWeight, LoraWeights]]

INITIALIZERS: Mapping[str, Initializer] = {"pissa": pissa, "loftq": loftq}
"""Name to a function that splits a weight into a stored weight and an adapter."""
