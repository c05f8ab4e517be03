"""Tests reading machine code, on listings by hand and on a kernel compiled for a real GPU."""

import collections
import json
import subprocess
import sys

import pytest

from qlora_jax.gpu import assemble, sass
from qlora_jax.gpu.compile import NO_SPILLS, environment, has_plugin
from qlora_jax.gpu.sass import Instruction, SassKernel, classify, histogram, loops, mma_flop, parse

LISTING = """
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_outer:
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_main:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
        /*0030*/              @!P0 BRA `(.L_slow) ;
.L_ready:
        /*0040*/                   LDS.128 R8, [R1] ;
        /*0050*/                   PRMT R9, R8, 0x5410, R7 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/               @P1 BRA `(.L_main) ;
        /*0080*/                   BRA.U UP0, `(.L_outer) ;
        /*0090*/                   STG.E [R4.64], R4 ;
        /*00a0*/                   EXIT ;
.L_slow:
        /*00b0*/                   NANOSLEEP 0x10 ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
        /*00d0*/              @!P0 BRA `(.L_slow) ;
        /*00e0*/                   BRA `(.L_ready) ;
.L_end:
        /*00f0*/                   BRA `(.L_end);
"""


def kernel(code: tuple[Instruction, ...]) -> SassKernel:
    return SassKernel("kernel", "sm_90a", 32, 0, 0, None, code)


def test_the_main_loop_is_the_innermost_one_with_tensor_instructions() -> None:
    code = parse(LISTING)
    assert len(code) == 16
    assert code[4] == Instruction("LDS.128", "R8, [R1]", labels=(".L_ready",))
    assert code[3].conditional
    loop = kernel(code).main_loop()
    # The store after the loop is not in it, although the slow path jumps back over the store.
    assert [i.name.partition(".")[0] for i in loop] == [
        *("SYNCS", "BRA", "LDS", "PRMT", "HMMA", "BRA"),
        *("NANOSLEEP", "SYNCS", "BRA", "BRA"),
    ]
    assert histogram(loop) == {"control": 7, "shared": 1, "integer": 1, "tensor": 1}
    assert sorted(map(len, loops(code))) == [3, 10, 12]


def test_without_tensor_instructions_it_is_the_loop_of_other_products() -> None:
    code = parse(LISTING.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert [i.name for i in kernel(code).main_loop()][4] == "FFMA"
    assert kernel(parse(LISTING.replace("HMMA.16816.F32.BF16", "MOV"))).main_loop() == ()
    assert kernel(parse("  /*0000*/ EXIT ;")).main_loop() == ()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HMMA.16816.F32", "tensor"),
        ("HGMMA.64x128x16.F32.BF16", "tensor"),
        ("UTCHMMA.2CTA", "tensor"),
        ("LDSM.16.M88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("UTMALDG.2D", "global"),
        ("STL", "local"),
        ("HMUL2.BF16_V2", "float16"),
        ("FSEL", "integer"),
        ("LOP3.LUT", "integer"),
        ("IMAD.MOV.U32", "multiply"),
        ("ULDC.64", "uniform"),
        ("LDGDEPBAR", "control"),
        ("I2F.U8", "convert"),
    ],
)
def test_classes(name: str, kind: str) -> None:
    assert classify(name) == kind


@pytest.mark.parametrize(
    ("name", "flop"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
    ],
)
def test_flop_of_a_tensor_instruction(name: str, flop: int) -> None:
    assert mma_flop(name) == flop


COMPILED = """
import json, pathlib, sys, tempfile
import jax, jax.numpy as jnp
from qlora_jax.kernels import triton
from qlora_jax.gpu import assemble, sass
from qlora_jax.gpu.compile import compile_for
from qlora_jax.quant import quantize
q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((256, 128), jnp.float32))
x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
with tempfile.TemporaryDirectory() as folder, assemble.dumping(pathlib.Path(folder)) as options:
    compile_for("a100", triton.forward, x, q, options=options)
    (kernel,) = assemble.kernels(pathlib.Path(folder))
loop = kernel.main_loop()
print(json.dumps({
    "target": kernel.target, "registers": kernel.registers, "spill": kernel.spill_bytes,
    "shared": kernel.shared, "launch": kernel.launch, "flop": sass.tensor_flop(loop),
    "classes": sass.histogram(loop), "instructions": len(kernel.code),
}))
"""


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
def test_a_kernel_for_an_a100() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment(NO_SPILLS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["target"] == "sm_80"
    assert 32 <= seen["registers"] <= 255
    assert seen["spill"] == 0
    # 4 warps compute a tile of 64 x 64; each turn of the loop covers 64 of K.
    assert seen["launch"][:2] == [2, 128]
    assert seen["flop"] * 4 == 2 * 64 * 64 * 64
    assert seen["classes"]["tensor"] == seen["flop"] // 4096
    assert 0 < seen["shared"] == seen["launch"][2]
    assert collections.Counter(seen["classes"]).total() < seen["instructions"]


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "find_spec", lambda name: None)
    monkeypatch.setattr(assemble.shutil, "which", lambda name, path=None: None)
    with pytest.raises(assemble.UserError, match="ptxas is not installed; run make gpu-check"):
        assemble.program("ptxas")


def test_an_instruction_whose_shape_is_in_a_descriptor_is_not_counted() -> None:
    code = [Instruction("HMMA.16816.F32.BF16", ""), Instruction("UTCHMMA.2CTA", "")]
    assert sass.tensor_flop(code) == 2 * 16 * 8 * 16
