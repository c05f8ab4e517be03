"""The program `qlora-jax`, also `python -m qlora_jax`."""

import sys

from qlora_jax import startup


def main() -> int:
    """Runs `cli.main` in a process that `startup` has set up."""
    startup.prepare()
    from qlora_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
