"""The papers' questions, a module each, and the programs behind the documentation's figures.

A module here that declares `EXPERIMENT` is a question: `qlora-jax sweep NAME` runs it. `inputs`
says what they run on; `cells` has what their cells share. The folders hold programs, each run as
`python -m experiments.FOLDER.NAME`: `benchmarks` measures speed and memory, `tools` makes tables
and checks, `faults` tries to break qlora-jax.
"""
