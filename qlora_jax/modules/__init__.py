"""QLoRA for any Flax model. `adapt` changes NNX modules; `trace` keeps a weight in 4 bits."""
