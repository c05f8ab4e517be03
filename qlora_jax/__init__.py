"""LoRA and QLoRA fine-tuning in JAX: 4-bit weights and adapters as pure functions over pytrees."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax.kernels import matmul as matmul
    from qlora_jax.quant import CODEBOOKS as CODEBOOKS
    from qlora_jax.quant import QTensor as QTensor
    from qlora_jax.quant import dequantize as dequantize
    from qlora_jax.quant import quantize as quantize

_HOMES = {
    "matmul": "kernels",
    "CODEBOOKS": "quant",
    "QTensor": "quant",
    "dequantize": "quant",
    "quantize": "quant",
}
__all__ = tuple(_HOMES)


def __getattr__(name: str) -> Any:
    # On first use: jax takes a second to import, which `qlora-jax --help` should not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
