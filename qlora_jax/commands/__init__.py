"""The commands of `qlora-jax`, one module each.

A command is `TEXT`, what it does in a line; `add_arguments(parser)`; and `run(options, settings,
command)` with its options, the `--section.key=value` settings (where its parser has the default
`settings=True`), and the command line that was given. Modules import jax in `run` alone.
"""
