"""Variants of the adapted product (LoRA, DoRA), by the name in `lora.variant`."""

from collections.abc import Callable, Mapping

import jax

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.variants.dora import dora
from qlora_jax.quant import QTensor

VARIANTS: Mapping[str, Callable[[Adapter, jax.Array | QTensor], Adapter]] = {
    "lora": lambda adapter, weight: adapter,
    "dora": dora,
}
"""Name to a function that makes the variant from a plain adapter and its stack of weights."""
