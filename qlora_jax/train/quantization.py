"""Chooses and describes the quantization of a run's base: from the config or the checkpoint."""

from qlora_jax.config import ModelSettings, QuantConfig
from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.formats.checkpoint import Checkpoint


def held_quantization(config: ModelSettings, checkpoint: Checkpoint) -> QuantConfig | None:
    """Returns the quantization of the linears: that of a 4-bit checkpoint, else the config's."""
    if config.method != "qlora":
        return None
    return checkpoint.quantization.config if checkpoint.quantization else config.quant


def describe_stored(config: ModelSettings, stored: Quantization) -> list[str]:
    """Returns lines about the 4-bit weights of a checkpoint, for the user."""
    line = f"4-bit weights as they are stored: {describe_quantization(stored.config)}"
    if stored.config != config.quant:
        line += f"; the config's quant ({describe_quantization(config.quant)}) is not used"
    if not (floats := stored.dequantized):
        return [line]
    return [
        line,
        f"warning: {len(floats)} weights whose in_features is no multiple of 32 cannot be held in "
        f"4 bits and take 16 or 32, first {floats[0]}",
    ]


def describe_quantization(quant: QuantConfig | None) -> str:
    """Returns a description of the base's quantization; empty if the base is not quantized."""
    if quant is None:
        return ""
    double = ", double quantization" if quant.double_quant else ""
    return f"{quant.codebook}, block {quant.block_size}{double}"
