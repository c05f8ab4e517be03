"""The program `qlora-jax`, also `python -m qlora_jax`."""

import sys

from qlora_jax import hugepages


def main() -> int:
    """`cli.main`, in a process that has huge pages."""
    hugepages.restart()
    from qlora_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
