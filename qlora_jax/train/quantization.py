"""How a run holds its base: by the config or as the weights are stored, and in words."""

from qlora_jax.config import ModelSettings, QuantConfig
from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.formats.checkpoint import Checkpoint


def held_quantization(config: ModelSettings, checkpoint: Checkpoint) -> QuantConfig | None:
    """How the linears are held: as they are stored in 4 bits, else as the config says."""
    if config.method != "qlora":
        return None
    return checkpoint.quantization.config if checkpoint.quantization else config.quant


def describe_stored(config: ModelSettings, stored: Quantization) -> list[str]:
    """Lines on the 4-bit weights of a checkpoint, for the user."""
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
    """The base's storage in words; empty when it is not quantized."""
    if quant is None:
        return ""
    double = ", double quantization" if quant.double_quant else ""
    return f"{quant.codebook}, block {quant.block_size}{double}"
