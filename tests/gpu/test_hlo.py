"""Tests reading a compiled program's text, on programs written by hand and by XLA."""

import jax
import jax.numpy as jnp

from qlora_jax.gpu.hlo import operations, passes, products_of, weight_shaped

HLO = """HloModule m

%fused_add (a: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} add(%a, %a)
}

%gemm (p: bf16[16,64], w: bf16[64,32]) -> bf16[16,32] {
  ROOT %d = f32[16,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}
}

ENTRY %main (x: bf16[16,64], q: u8[32,32], s: f32[8]) -> bf16[16,32] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %q.1 = u8[32,32]{1,0} parameter(1)
  %s.1 = f32[8]{0} parameter(2)
  %b = f32[1,8]{1,0} bitcast(%s.1)
  %loop_add = f32[8]{0} fusion(%s.1), kind=kLoop, calls=%fused_add, metadata={op_name="a(b)"}
  %decode.2 = (bf16[64,32]{1,0}, s4[10]{0}) custom-call(%q.1, %loop_add), custom_call_target="f"
  %g = bf16[64,32]{1,0} get-tuple-element(%decode.2), index=0
  ROOT %gemm_fusion = bf16[16,32]{1,0} fusion(%x.1, /*index=1*/%g), kind=kCustom, calls=%gemm, x
}
"""


def test_bytes_of_a_program() -> None:
    found = operations(HLO)
    assert [o.name for o in found] == ["loop_add", "decode.2", "gemm_fusion"]
    assert [o.multiplies for o in found] == [False, False, True]
    weight = 64 * 32 * 2
    assert [o.bytes for o in found] == [
        32 + 32,
        weight + 5 + 32 * 32 + 32,
        16 * 32 * 2 + 16 * 64 * 2 + weight,
    ]


LOOP = """
%fused (p: u8[8]) -> f32[6,4] {
  ROOT %inside = f32[6,4]{1,0} convert(%p)
}

%body (t: (f32[2])) -> (f32[2]) {
  %in_a_loop = bf16[24]{0} fusion(%t), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[3]) -> f32[3] {
  %codes = u8[6,4]{1,0} parameter(0)
  %turned = f32[4,6]{1,0} fusion(%codes), kind=kLoop, calls=%fused
  %pair = (f16[2,2,2,2,3]{1,0}, s8[4]{0}) custom-call(%codes), custom_call_target="f"
  %loop = (f32[2]{0}) while(%x), condition=%c, body=%body
  ROOT %x = f32[5,5]{1,0} add(%turned)
}
"""


def test_buffers_are_found_by_their_size() -> None:
    assert weight_shaped(LOOP, [(6, 4)], layers=2) == [
        "in_a_loop = bf16[24]",
        "turned = f32[4,6]",
        "pair = f16[2,2,2,2,3]",
    ]
    assert weight_shaped(LOOP, [(6, 4)]) == ["in_a_loop = bf16[24]", "turned = f32[4,6]"]
    assert weight_shaped(LOOP, [(7, 4)], layers=2) == []


PRODUCTS = """
%fused (p: f16[4,6], s: f32[6,8]) -> f32[4,8] {
  %p = f16[4,6]{1,0} parameter(0)
  %w = f32[4,6]{1,0} convert(%p)
  %s = f32[6,8]{1,0} parameter(1)
  ROOT %wide = f32[4,8]{1,0} dot(%w, %s), lhs_contracting_dims={1}
}

ENTRY %main (x: f16[4,6], w: f16[6,8]) -> f32[4,8] {
  %x = f16[4,6]{1,0} parameter(0)
  %w = f16[6,8]{1,0} parameter(1)
  %library = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %other = f32[4,8]{1,0} custom-call(%x, %w), custom_call_target="f"
  ROOT %y = f32[4,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
}
"""


def test_products_by_their_operands() -> None:
    assert products_of(PRODUCTS, "f32") == ["wide"]
    assert products_of(PRODUCTS, "f16") == ["library"]
    assert [o.multiplies for o in operations(PRODUCTS)] == [True, False, True]


def test_a_product_compiled_here() -> None:
    x = jnp.ones((8, 16), jnp.float32)
    text = jax.jit(lambda x: x @ x.T).lower(x).compile().as_text()
    assert text is not None
    assert len(products_of(text, "f32")) == 1
    assert products_of(text, "bf16") == []


def test_passes_over_large_arrays_are_counted_without_products_and_kernels() -> None:
    found = passes(LOOP, 96)
    assert [(p.name, p.arrays) for p in found] == [("turned", 1), ("x", 2)]
    assert passes(LOOP, 97)[0].name == "x"
    assert passes(HLO, 16)[0].origin == "a(b)"
    assert "gemm_fusion" not in [p.name for p in passes(HLO, 16)]
