"""Faults that qlora-jax must survive, one module per part: `python -m experiments.faults`."""
