"""The program `qlora-jax`, also `python -m qlora_jax`."""

import sys

from qlora_jax import compilation, hugepages


def main() -> int:
    """`cli.main`, in a process that has huge pages and wide vectors and keeps what it compiles."""
    hugepages.restart()
    compilation.widen()
    compilation.keep()
    from qlora_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
