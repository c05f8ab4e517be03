"""Puts 4-bit weights and adapters into the params of any Linen module, and returns new params.

In the new params, a `Kernel` replaces each array that is in 4 bits or has adapters. Call `apply`
instead of `module.apply`.
"""

from qlora_jax.modules.kernel import Kernel as Kernel
from qlora_jax.modules.linen.adapters import join as join
from qlora_jax.modules.linen.adapters import split as split
from qlora_jax.modules.linen.adapters import use_adapter as use_adapter
from qlora_jax.modules.linen.call import apply as apply
from qlora_jax.modules.linen.call import discover as discover
from qlora_jax.modules.linen.call import summary as summary
from qlora_jax.modules.linen.saving import load_adapter as load_adapter
from qlora_jax.modules.linen.saving import save_adapter as save_adapter
from qlora_jax.modules.linen.weights import add_lora as add_lora
from qlora_jax.modules.linen.weights import merge as merge
from qlora_jax.modules.linen.weights import quantize as quantize
