"""Reads and writes adapters in PEFT's format: adapter_config.json, adapter_model.safetensors."""

from qlora_jax.formats.peft.adapter import CONFIG as CONFIG
from qlora_jax.formats.peft.adapter import AdapterSet as AdapterSet
from qlora_jax.formats.peft.adapter import Replaced as Replaced
from qlora_jax.formats.peft.adapter import without_effect as without_effect
from qlora_jax.formats.peft.fit import check_fits as check_fits
from qlora_jax.formats.peft.fit import replaced_tensors as replaced_tensors
from qlora_jax.formats.peft.read import read_adapter as read_adapter
from qlora_jax.formats.peft.read import sha256 as sha256
from qlora_jax.formats.peft.write import write_adapter as write_adapter
