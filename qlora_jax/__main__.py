"""The program `qlora-jax`, also `python -m qlora_jax`."""

import sys

from qlora_jax import compilation, cuda_toolkit, gpu_memory, hugepages


def main() -> int:
    """`cli.main`, in a process that is set up for speed and keeps what it compiles."""
    hugepages.restart()
    compilation.widen()
    gpu_memory.claim()
    cuda_toolkit.point()
    compilation.keep()
    from qlora_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
