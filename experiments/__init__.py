"""Experiments on the papers' claims, and programs that make the documentation's figures.

A module of this folder that declares `EXPERIMENT` answers one question; `qlora-jax sweep NAME` runs
it. `inputs` names the models, texts and configs of the experiments; `cells` holds the functions
that several experiments share. The subfolders hold programs, each run as
`python -m experiments.FOLDER.NAME`: `benchmarks` measures speed and memory, `tools` makes tables
and runs checks, `faults` tries to break qlora-jax.
"""
