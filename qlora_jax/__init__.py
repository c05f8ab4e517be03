"""LoRA and QLoRA fine-tuning in JAX: 4-bit weights and adapters as pure functions over pytrees."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax import lora as lora
    from qlora_jax.kernels import matmul as matmul
    from qlora_jax.library import generate as generate
    from qlora_jax.library import load as load
    from qlora_jax.library import train as train
    from qlora_jax.lora import LoraParam as LoraParam
    from qlora_jax.lora import quantize_tree as quantize_tree
    from qlora_jax.modules import linen as linen
    from qlora_jax.modules.discover import discover as discover
    from qlora_jax.modules.fill import fill as fill
    from qlora_jax.modules.kernel_rules import register_kernel as register_kernel
    from qlora_jax.modules.nnx_files import load_adapter as load_adapter
    from qlora_jax.modules.nnx_files import save_adapter as save_adapter
    from qlora_jax.modules.nnx_model import add_lora as add_lora
    from qlora_jax.modules.nnx_model import join as join
    from qlora_jax.modules.nnx_model import merge as merge
    from qlora_jax.modules.nnx_model import quantize_model as quantize_model
    from qlora_jax.modules.nnx_model import split as split
    from qlora_jax.modules.nnx_model import use_adapter as use_adapter
    from qlora_jax.modules.summary import summary as summary
    from qlora_jax.quant import CODEBOOKS as CODEBOOKS
    from qlora_jax.quant import QTensor as QTensor
    from qlora_jax.quant import dequantize as dequantize
    from qlora_jax.quant import quantize as quantize
    from qlora_jax.runtime.errors import UserError as UserError

_HOMES = {
    "LoraParam": "lora",
    "add_lora": "modules.nnx_model",
    "discover": "modules.discover",
    "load_adapter": "modules.nnx_files",
    "save_adapter": "modules.nnx_files",
    "fill": "modules.fill",
    "join": "modules.nnx_model",
    "merge": "modules.nnx_model",
    "quantize_model": "modules.nnx_model",
    "quantize_tree": "lora",
    "UserError": "runtime.errors",
    "register_kernel": "modules.kernel_rules",
    "split": "modules.nnx_model",
    "summary": "modules.summary",
    "use_adapter": "modules.nnx_model",
    "matmul": "kernels",
    "CODEBOOKS": "quant",
    "QTensor": "quant",
    "dequantize": "quant",
    "quantize": "quant",
    "load": "library",
    "generate": "library",
}
_MODULES = {"linen": "modules.linen", "lora": "lora", "train": "train"}
__all__ = (*_HOMES, *_MODULES)


def __getattr__(name: str) -> Any:
    # Imports on first use, because jax takes a second to import and `qlora-jax --help` must not.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
