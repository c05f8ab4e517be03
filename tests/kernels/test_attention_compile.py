"""The attention kernels compiled for absent GPUs: no spill, no T x T array in memory.

Run as a script with the name of a GPU, it compiles all KINDS and prints the figures as JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.gpu import assemble
from qlora_jax.gpu.compile import NO_SPILLS, compile_for, environment, has_plugin
from qlora_jax.gpu.described import read_gpu
from qlora_jax.kernels.attention import triton

GPUS = ("a100", "rtx4090", "h100", "b200")
HEADS, KV_HEADS, LENGTH = 32, 8, 32768
KINDS = [
    # head size, dtype, soft cap
    (64, "bfloat16", None),
    (96, "bfloat16", None),
    (128, "bfloat16", None),
    (128, "float16", 30.0),
    (256, "bfloat16", 50.0),
    (256, "bfloat16", None),
    (64, "float16", 30.0),
]
KERNELS = {"attention_forward_kernel", "attention_queries_kernel", "attention_keys_kernel"}


def compiled(gpu: str, size: int, dtype: str, softcap: float | None) -> dict[str, Any]:
    """Compiles a forward and a backward pass over one row; returns the figures."""

    def array(*shape: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), of)

    def both(q, k, v, first, last, g):
        known = size**-0.5, softcap, q, k, v, first, last
        out, normalizer = triton.forward(*known)
        return out, *triton.backward(*known, out, normalizer, g)

    q, k = array(LENGTH, HEADS, size), array(LENGTH, KV_HEADS, size)
    place = array(LENGTH, of=jnp.int32)
    with tempfile.TemporaryDirectory() as name, assemble.dumping(folder := Path(name)) as options:
        program = compile_for(gpu, both, q, k, k, place, place, q, options=options)
        found = [kernel for kernel in assemble.kernels(folder) if kernel.name in KERNELS]
    return {
        "kind": [size, dtype, softcap],
        "temporaries": program.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        "kernels": {
            kernel.name: {
                "registers": kernel.registers,
                "spilled": kernel.spill_bytes,
                "shared": kernel.shared,
            }
            for kernel in found
        },
    }


@pytest.mark.skipif(not has_plugin(), reason="needs the compile-only packages: make gpu-check")
@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_fit(gpu: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, gpu], env=environment(NO_SPILLS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in done.stdout.splitlines():
        made = json.loads(line)
        assert made["kernels"].keys() == KERNELS
        for figures in made["kernels"].values():
            assert not figures["spilled"], made
            assert figures["shared"] <= read_gpu(gpu).shared, made
        # the bound fits the arrays that the forward pass saves; T x T scores would be far larger
        size = made["kind"][0]
        assert made["temporaries"] <= 2 * LENGTH * HEADS * size * 2, made


def main(gpu: str) -> None:
    for kind in KINDS:
        print(json.dumps(compiled(gpu, *kind)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
