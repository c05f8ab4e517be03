"""Benchmarks that a peer's interpreter runs: modules TOOL_BENCHMARK, each with `run(options)`.

They import the peer's packages. Unless the peer itself uses jax, they import only those modules of
this package that need no jax.
"""
