"""What an adapter does to its weight, by the name in `lora.variant`."""

from collections.abc import Callable, Mapping

import jax

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.variants.dora import dora
from qlora_jax.quant import QTensor

VARIANTS: Mapping[str, Callable[[Adapter, jax.Array | QTensor], Adapter]] = {
    "lora": lambda adapter, weight: adapter,
    "dora": dora,
}
"""Name to what makes the variant of a plain adapter and the stack of weights it is for."""
