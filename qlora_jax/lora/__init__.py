"""Low-rank adapters."""

from qlora_jax.lora.adapter import Adapter as Adapter
from qlora_jax.lora.adapter import LoraB as LoraB
from qlora_jax.lora.adapter import LoraParam as LoraParam
from qlora_jax.lora.adapter import LoraVector as LoraVector
from qlora_jax.lora.adapter import Values as Values
from qlora_jax.lora.adapter import filled as filled
from qlora_jax.lora.adapter import init_adapter as init_adapter
from qlora_jax.lora.spec import AdapterSpec as AdapterSpec
from qlora_jax.lora.spec import plan as plan
from qlora_jax.lora.spec import ranks_above_full as ranks_above_full
