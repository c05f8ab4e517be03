"""Counts how often a layer's step reads or writes its activations outside matrix products.

Question: how much of a step is elementwise work over tokens x hidden that XLA did not fuse?
Expected: a few operations in the forward pass of a layer, and some two dozen in its backward pass.
Cost: under a minute on 2 CPU cores; no GPU. Needs the extra `gpu-check`.
Command: python -m experiments.tools.passes [--model llama3-8b --gpu h100 --seq 8192]
"""

import os
import sys

from experiments.tools import program
from qlora_jax.commands import plan as command
from qlora_jax.gpu.compile import FLAGS, compile_for, environment
from qlora_jax.gpu.described import read_gpu
from qlora_jax.gpu.hlo import Pass, passes
from qlora_jax.models.shapes import find
from qlora_jax.plan import compiled_memory

NAME = "experiments.tools.passes"


def of_model(model: str, gpu: str, length: int) -> dict[str, list[Pass]]:
    """Returns, by program, the passes over arrays of at least tokens x hidden.

    The model recomputes its layers (remat policy `full`).
    """
    settings = {"data.sequence_length": str(length), "model.remat": "full", "lora.rank": "32"}
    decoder = find(model)
    step = compiled_memory.abstract_step(command.of_model(model, settings), decoder, read_gpu(gpu))
    found = {}
    for piece in compiled_memory.list_gradient_programs(step):
        compiled = compile_for(gpu, piece.function, *piece.arguments, donate=piece.donate)
        found[piece.name] = passes(compiled.as_text() or "", 2 * length * decoder.hidden_size)
    return found


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--model", default="llama3-8b", metavar="NAME")
    parser.add_argument("--gpu", default="h100", metavar="NAME")
    parser.add_argument("--seq", type=int, default=8192, metavar="N")
    options = parser.parse_args()
    if FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
        # jax reads these flags at its first import, so the process starts again with them
        os.execve(sys.executable, [sys.executable, "-m", NAME, *sys.argv[1:]], environment())
    for name, found in of_model(options.model, options.gpu, options.seq).items():
        arrays = sum(row.arrays for row in found)
        print(f"{name}: {len(found)} operations, {arrays} arrays read or written")
        for row in found:
            print(f"  {row.arrays}  {row.name}  {row.origin[-70:]}")
    return 0


if __name__ == "__main__":
    program.run(main)
