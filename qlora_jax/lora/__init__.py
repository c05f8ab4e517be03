"""Low-rank adapters: `linear` has the adapted linear, `spec` chooses linears, rank and scale."""

from qlora_jax.lora.adapter import Adapter as Adapter
from qlora_jax.lora.groups import group_labels as group_labels
from qlora_jax.lora.initializers.random_init import init_adapter as init_adapter
from qlora_jax.lora.initializers.random_init import init_embedding as init_embedding
from qlora_jax.lora.linear import LoraLinear as LoraLinear
from qlora_jax.lora.masks import trainable_mask as trainable_mask
from qlora_jax.lora.spec import AdapterSpec as AdapterSpec
from qlora_jax.lora.spec import choose_adapters as choose_adapters
from qlora_jax.lora.spec import ranks_above_full as ranks_above_full
from qlora_jax.lora.trees import LowRank as LowRank
from qlora_jax.lora.trees import apply as apply
from qlora_jax.lora.trees import init as init
from qlora_jax.lora.trees import quantize_tree as quantize_tree
from qlora_jax.lora.variables import LoraParam as LoraParam
from qlora_jax.lora.variables import Weight as Weight
from qlora_jax.lora.weights import LoraSet as LoraSet
from qlora_jax.lora.weights import LoraWeights as LoraWeights
