"""What a peer's own interpreter runs: modules named TOOL_WHAT, each with `run(options)`.

They import the peer's packages and, of this one, only what needs no jax.
"""
