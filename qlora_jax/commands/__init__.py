"""The commands of `qlora-jax`, one module each.

The module of a command has three names. `TEXT` says in one line what the command does.
`add_arguments(parser)` adds the command's options. `run(options, settings, command)` runs the
command. Its parameters are the parsed options, the settings `--section.key=value` (if the parser
has the default `settings=True`), and the command line. Only `run` may import jax.
"""
