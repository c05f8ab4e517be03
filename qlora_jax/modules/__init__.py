"""QLoRA for any Flax model: `adapt` is the idea for NNX, `trace` how a weight stays 4 bits."""
