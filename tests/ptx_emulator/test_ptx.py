"""Tests the PTX emulator on hand-written PTX: the ISA manual's definitions, and errors."""

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import Deadlock, Fault, Race, Unsupported, emulate

NAN = float("nan")
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def module(body: str, parameters: int, outside: str = "") -> str:
    """Returns a kernel with its pointers in %d0, %d1, ..., the thread in %r0, 4 x it in %d9."""
    names = ", ".join(f".param .u64 .ptr .align 16 p{i}" for i in range(parameters))
    loads = "\n".join(
        f"ld.param.u64 %d{i}, [p{i}]; cvta.to.global.u64 %d{i}, %d{i};" for i in range(parameters)
    )
    return f"""
    .version 8.0
    .target sm_80
    .address_size 64
    {outside}
    .visible .entry k({names})
    .maxntid 128, 1, 1
    {{
        .reg .pred %p<9>;  .reg .b16 %h<33>;  .reg .b32 %r<65>;  .reg .b64 %d<33>;
        .shared .align 16 .b8 tile[2048];
        {loads}
        mov.u32 %r0, %tid.x; // the thread
        mul.wide.u32 %d9, %r0, 4;
        {body}
        ret;
    }}
    """


def run(body: str, *arrays, threads: int = 32, grid: int = 1, outside: str = "") -> None:
    emulate(module(body, len(arrays), outside), (grid,), (threads,), arrays, limit=100_000)


def words(body: str, threads: int = 32, outside: str = "") -> np.ndarray:
    """Returns the value of %r1 of each thread after `body`."""
    out = np.zeros(threads, np.uint32)
    run(
        f"{body}\nadd.s64 %d10, %d0, %d9; st.global.b32 [%d10], %r1;",
        out,
        threads=threads,
        outside=outside,
    )
    return out


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


# ---- arithmetic


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("mov.b32 %r2, -7; mov.b32 %r3, 2; div.s32 %r1, %r2, %r3;", -3),
        ("mov.b32 %r2, -7; mov.b32 %r3, 2; rem.s32 %r1, %r2, %r3;", -1),
        ("mov.b32 %r2, -7; div.u32 %r1, %r2, 2;", 0x7FFFFFFC),
        ("mov.b32 %r2, 0x80000000; mul.hi.s32 %r1, %r2, 3;", -2),
        ("mov.b32 %r2, 0x80000000; mul.hi.u32 %r1, %r2, 3;", 1),
        ("mov.b16 %h1, -3; mul.wide.s16 %r1, %h1, 1000;", -3000),
        ("mov.b32 %r2, 70000; mad.lo.s32 %r1, %r2, %r2, 5;", (70000**2 + 5) % 2**32),
        ("mov.b32 %r2, -5; mov.b32 %r3, 4; min.u32 %r1, %r2, %r3;", 4),
        ("mov.b32 %r2, -5; mov.b32 %r3, 4; min.s32 %r1, %r2, %r3;", -5),
        ("mov.b32 %r2, 1; shl.b32 %r1, %r2, 33;", 0),
        ("mov.b32 %r2, -8; shr.s32 %r1, %r2, 1;", -4),
        ("mov.b32 %r2, -8; shr.s32 %r1, %r2, 40;", -1),
        ("mov.b32 %r2, -8; shr.u32 %r1, %r2, 28;", 15),
        ("mov.b32 %r2, 0x12345678; bfe.u32 %r1, %r2, 8, 12;", 0x456),
        ("mov.b32 %r2, 0x00000F00; bfe.s32 %r1, %r2, 8, 4;", -1),
        ("mov.b32 %r2, 0xAB; mov.b32 %r3, -1; bfi.b32 %r1, %r2, %r3, 4, 8;", 0xFFFFFABF),
        ("mov.b32 %r2, 0x12345678; mov.b32 %r3, 0x9ABCDEF0; shf.l.wrap.b32 %r1, %r2, %r3, 8;",
         0xBCDEF012),
        ("mov.b32 %r2, 0x12345678; mov.b32 %r3, 0x9ABCDEF0; shf.r.wrap.b32 %r1, %r2, %r3, 8;",
         0xF0123456),
        ("mov.b32 %r2, 0x00010000; clz.b32 %r1, %r2;", 15),
        ("mov.b32 %r2, 0x00010001; popc.b32 %r1, %r2;", 2),
        ("mov.b32 %r2, 0x00000003; brev.b32 %r1, %r2;", 0xC0000000),
        ("mov.b32 %r2, 0xF0F0; mov.b32 %r3, 0xCCCC; mov.b32 %r4, 0xAAAA;"
         "lop3.b32 %r1, %r2, %r3, %r4, 0xE8;", 0xE8E8),
        ("mov.b32 %r2, 0xF0F0; mov.b32 %r3, 0xCCCC; mov.b32 %r4, 0xAAAA;"
         "lop3.b32 %r1, %r2, %r3, %r4, 0x1E;", 0x1E1E),
        ("mov.b16 %h1, 0x8001; cvt.s32.s16 %r1, %h1;", -32767),
        ("mov.b16 %h1, 0x8001; cvt.u32.u16 %r1, %h1;", 0x8001),
        ("mov.b32 %r2, 300; cvt.sat.u8.u32 %h1, %r2; cvt.u32.u16 %r1, %h1;", 255),
        ("mov.b32 %r2, 300; cvt.u16.u8 %h1, %r2; cvt.u32.u16 %r1, %h1;", 44),
        ("mov.b16 %h1, 1; mov.b16 %h2, 2; mov.b32 %r1, {%h1, %h2};", 0x00020001),
        ("mov.b32 %r2, 0x00020001; mov.b32 {%h1, %h2}, %r2; cvt.u32.u16 %r1, %h2;", 2),
        ("mov.b32 %r2, -1; setp.lt.u32 %p1, %r2, 0; selp.b32 %r1, 7, 9, %p1;", 9),
        ("mov.b32 %r2, -1; setp.lt.s32 %p1|%p2, %r2, 0; selp.b32 %r1, 7, 9, %p2;", 9),
        ("mov.b32 %r2, 3; setp.eq.u32 %p1, %r2, 4; setp.gt.or.s32 %p2, %r2, 5, !%p1;"
         "selp.b32 %r1, 7, 9, %p2;", 7),
    ],
)  # fmt: skip
def test_integers(code, expected) -> None:
    assert set(words(code)) == {expected % 2**32}


def test_a_register_read_before_it_is_written() -> None:
    with pytest.raises(Fault, match=r"%h1.*read before it is written.*mov\.b32"):
        words("mov.b32 %r1, {%h1, %h1};")


@pytest.mark.parametrize(
    ("code", "a", "b", "expected"),
    [
        ("add.f32 %r1, %r2, %r3;", 1.5, 2.25, 3.75),
        ("add.rz.f32 %r1, %r2, %r3;", 1.0, 2.0**-24 * 1.5, 1.0),
        ("add.rp.f32 %r1, %r2, %r3;", 1.0, 2.0**-30, 1 + 2.0**-23),
        ("add.rm.f32 %r1, %r2, %r3;", -1.0, -(2.0**-30), -1 - 2.0**-23),
        ("min.f32 %r1, %r2, %r3;", NAN, 2.0, 2.0),
        ("min.NaN.f32 %r1, %r2, %r3;", NAN, 2.0, NAN),
        ("max.f32 %r1, %r2, %r3;", -0.0, 0.0, 0.0),
        ("mul.ftz.f32 %r1, %r2, %r3;", 2.0**-127, 2.0, 0.0),
        ("mul.f32 %r1, %r2, %r3;", 2.0**-127, 2.0, 2.0**-126),
        ("add.sat.f32 %r1, %r2, %r3;", 3.0, 4.0, 1.0),
        ("fma.rn.f32 %r1, %r2, %r2, %r3;", 1 + 2.0**-12, -1.0, 2.0**-11 + 2.0**-24),
        ("cvt.rni.f32.f32 %r1, %r2;", 2.5, 0, 2.0),
        ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r1, %r4;", -2.9, 0, -2.0),
        ("cvt.rzi.u8.f32 %r4, %r2; cvt.rn.f32.u32 %r1, %r4;", 1e9, 0, 255.0),
        ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r1, %r4;", 1e12, 0, 2.0**31),
        ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r1, %r4;", NAN, 0, 0.0),
        ("neg.f32 %r1, %r2;", 0.0, 0, -0.0),
        ("setp.ltu.f32 %p1, %r2, %r3; selp.f32 %r1, 0f3F800000, 0f00000000, %p1;", NAN, 0, 1.0),
        ("setp.ne.f32 %p1, %r2, %r3; selp.f32 %r1, 0f3F800000, 0f00000000, %p1;", NAN, 0, 0.0),
    ],
)
def test_floats(code, a, b, expected) -> None:
    loads = f"mov.b32 %r2, {bits(a)}; mov.b32 %r3, {bits(b)};"
    got = words(loads + code).view(np.float32)
    np.testing.assert_array_equal(got, np.float32(expected))
    assert np.isnan(expected) or np.all(np.signbit(got) == np.signbit(expected))


@pytest.mark.parametrize("type", DTYPES)
def test_narrow_types_round_once(type) -> None:
    dtype = DTYPES[type]
    random = np.random.default_rng(1)
    x = random.integers(0, 2**32, size=4096, dtype=np.uint32).view(np.float32)
    x[:4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-130, 70000.0
    x = np.where(np.isnan(x), np.float32(0), x)
    y = np.zeros(4096, dtype)
    run(
        f"""mov.u32 %r1, %ctaid.x; shl.b32 %r1, %r1, 7; add.u32 %r1, %r1, %r0;
        mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d0, %d2; ld.global.f32 %r2, [%d2];
        cvt.rn.{type}.f32 %h1, %r2;
        mul.wide.u32 %d3, %r1, 2; add.s64 %d3, %d1, %d3; st.global.b16 [%d3], %h1;""",
        x, y, threads=128, grid=32,
    )  # fmt: skip
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y.view(np.uint16), x.astype(dtype).view(np.uint16))


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (7, 37, 0.0, 260.0),
        (7, 37, -(2.0**-60), 258.0),
        (9, 29, 0.0, 260.0),
        (9, 29, 2.0**-60, 262.0),
    ],
)
def test_a_fused_product_of_bfloat16_rounds_the_exact_sum(a, b, c, expected) -> None:
    """The product lies halfway between two bfloat16, so c decides, but a float64 sum loses c."""

    def pair(value: float) -> int:
        return int(np.array([value, 1.0], ml_dtypes.bfloat16).view(np.uint32)[0])

    code = "".join(f"mov.b32 %r{i + 2}, {pair(v)};" for i, v in enumerate((a, b, c)))
    got = words(code + "fma.rn.bf16x2 %r1, %r2, %r3, %r4;").view(ml_dtypes.bfloat16)
    assert set(got[::2].astype(float)) == {expected}
    assert set(got[1::2].astype(float)) == {2.0}


def test_two_floats_pack_with_the_first_on_top() -> None:
    code = f"mov.b32 %r2, {bits(1.0)}; mov.b32 %r3, {bits(-2.0)}; cvt.rn.bf16x2.f32 %r1, %r2, %r3;"
    assert set(words(code)) == {0x3F80C000}


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x3210, 0x0123, 0x9CDE, 0xFEDC])
def test_prmt(selector) -> None:
    a, b = 0x83921170, 0xF4E5067F
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    expected = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        expected |= (byte if nibble < 8 else 255 if byte & 128 else 0) << 8 * i
    got = words(f"mov.b32 %r2, {a}; mov.b32 %r3, {b}; prmt.b32 %r1, %r2, %r3, {selector:#x};")
    assert set(got) == {expected}


# ---- matrices


def pack(low, high) -> int:
    return int(np.asarray(low).view(np.uint16)) | int(np.asarray(high).view(np.uint16)) << 16


@pytest.mark.parametrize("type", DTYPES)
def test_mma_by_the_manual_s_fragments(type) -> None:
    random = np.random.default_rng(2)
    a = random.normal(size=(16, 16)).astype(DTYPES[type])
    b = random.normal(size=(16, 8)).astype(DTYPES[type])
    c = random.normal(size=(16, 8)).astype(np.float32)
    registers = np.zeros((10, 32), np.uint32)
    where = {}
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(0, 8, 2):
            row = group if i in (0, 4) else group + 8
            column = thread * 2 + (0 if i < 4 else 8)
            registers[i // 2, lane] = pack(a[row, column], a[row, column + 1])
        for i in range(0, 4, 2):
            row = thread * 2 + (0 if i < 2 else 8)
            registers[4 + i // 2, lane] = pack(b[row, group], b[row + 1, group])
        for i in range(4):
            where[lane, i] = (group if i < 2 else group + 8), thread * 2 + i % 2
            registers[6 + i, lane] = c[where[lane, i]].view(np.uint32)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d2+{128 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%d3+{128 * i}], %r{20 + i};" for i in range(4))
    out = np.zeros((4, 32), np.float32)
    run(
        f"""add.s64 %d2, %d0, %d9; add.s64 %d3, %d1, %d9; {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.{type}.{type}.f32 {{%r20,%r21,%r22,%r23}},
            {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%r16,%r17,%r18,%r19}};
        {stores}""",
        registers, out,
    )  # fmt: skip
    d = np.zeros((16, 8), np.float32)
    for (lane, i), place in where.items():
        d[place] = out[i, lane]
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(d, exact, rtol=2.0**-23)


def test_ldmatrix_feeds_mma_with_row_major_tiles() -> None:
    """Loads A by rows, and B by rows with `.trans`, which is the common use."""
    random = np.random.default_rng(3)
    a = random.normal(size=(16, 16)).astype(ml_dtypes.bfloat16)
    b = random.normal(size=(16, 8)).astype(ml_dtypes.bfloat16)
    d = np.full((16, 8), np.nan, np.float32)
    run(
        """mov.b64 %d4, tile;
        mul.wide.u32 %d5, %r0, 16; add.s64 %d6, %d0, %d5; add.s64 %d7, %d4, %d5;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d6];
        st.shared.v4.b32 [%d7], {%r2, %r3, %r4, %r5};
        setp.lt.u32 %p1, %r0, 16;
        add.s64 %d6, %d1, %d5;
        @%p1 ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d6];
        @%p1 st.shared.v4.b32 [%d7+512], {%r2, %r3, %r4, %r5};
        bar.sync 0;
        and.b32 %r6, %r0, 15; shr.u32 %r7, %r0, 4;
        mul.wide.u32 %d6, %r6, 32; mul.wide.u32 %d8, %r7, 16;
        add.s64 %d6, %d6, %d8; add.s64 %d6, %d6, %d4;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%d6];
        mul.wide.u32 %d6, %r6, 16; add.s64 %d6, %d6, %d4;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%d6+512];
        mov.b32 %r16, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20,%r21,%r22,%r23},
            {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%r16,%r16,%r16,%r16};
        shr.u32 %r6, %r0, 2; and.b32 %r7, %r0, 3;
        mul.wide.u32 %d6, %r6, 32; mul.wide.u32 %d8, %r7, 8;
        add.s64 %d6, %d6, %d8; add.s64 %d6, %d6, %d2;
        st.global.v2.b32 [%d6], {%r20, %r21};
        st.global.v2.b32 [%d6+256], {%r22, %r23};""",
        a, b, d,
    )  # fmt: skip
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.astype(np.float64), rtol=2.0**-23)


@pytest.mark.parametrize("suffix", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(suffix) -> None:
    x = np.arange(64, dtype=np.uint16)
    y = np.zeros(64, np.uint16)
    run(
        f"""mov.b64 %d4, tile; add.s64 %d5, %d0, %d9; add.s64 %d6, %d4, %d9;
        ld.global.b32 %r2, [%d5]; st.shared.b32 [%d6], %r2; bar.sync 0;
        and.b32 %r3, %r0, 7; mul.wide.u32 %d7, %r3, 16; add.s64 %d7, %d4, %d7;
        ldmatrix.sync.aligned.m8n8.x1{suffix}.shared.b16 {{%r4}}, [%d7];
        stmatrix.sync.aligned.m8n8.x1{suffix}.shared.b16 [%d7+512], {{%r4}};
        bar.sync 0; ld.shared.b32 %r5, [%d6+512]; add.s64 %d5, %d1, %d9;
        st.global.b32 [%d5], %r5;""",
        x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(x, y)


# ---- cp.async

COPY = """mov.b64 %d4, tile; mul.wide.u32 %d5, %r0, 16;
    add.s64 %d6, %d0, %d5; add.s64 %d7, %d4, %d5;
    cp.async.cg.shared.global [%d7], [%d6], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%d7+512], [%d6+512], 8; cp.async.commit_group;
"""
SHOW = "add.s64 %d8, %d1, %d9; st.global.b32 [%d8], %r1;"


def copied(code: str) -> np.ndarray:
    source = np.arange(256, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    run(COPY + code + SHOW, source, out)
    return out


def test_groups_land_in_order() -> None:
    first = copied("cp.async.wait_group 1; ld.shared.b32 %r1, [%d7];")
    np.testing.assert_array_equal(first, np.arange(32) * 4)
    second = copied("cp.async.wait_group 0; ld.shared.b32 %r1, [%d7+516];")
    np.testing.assert_array_equal(second, np.arange(32) * 4 + 129)


@pytest.mark.parametrize(
    "code",
    [
        "ld.shared.b32 %r1, [%d7];",
        "cp.async.wait_group 2; ld.shared.b32 %r1, [%d7];",
        "cp.async.wait_group 1; ld.shared.b32 %r1, [%d7+512];",
    ],
)
def test_a_copy_not_waited_for_is_not_there(code) -> None:
    with pytest.raises(Fault, match="read before anything wrote it"):
        copied(code)


def test_a_copy_in_flight_may_not_be_overtaken() -> None:
    with pytest.raises(Race, match=r"in flight.*cp\.async\.cg"):
        copied("cp.async.cg.shared.global [%d7], [%d6], 16; mov.b32 %r1, 0;")


def test_another_thread_s_copy_needs_a_barrier() -> None:
    read = "xor.b32 %r2, %r0, 1; mul.wide.u32 %d8, %r2, 16; add.s64 %d8, %d4, %d8;"
    read += "ld.shared.b32 %r1, [%d8];"
    with pytest.raises(Race, match="without a barrier after its write"):
        copied("cp.async.wait_all;" + read)
    got = copied("cp.async.wait_all; bar.sync 0;" + read)
    np.testing.assert_array_equal(got, (np.arange(32) ^ 1) * 4)


def test_a_short_copy_is_filled_with_zeros() -> None:
    code = "mov.b32 %r3, 6; add.s64 %d6, %d0, %d5;"
    code += "cp.async.cg.shared.global [%d7+1024], [%d6], 16, %r3; cp.async.wait_all;"
    np.testing.assert_array_equal(
        copied(code + "ld.shared.b32 %r1, [%d7+1028];"), np.arange(32) * 4 + 1
    )
    assert not copied(code + "ld.shared.b32 %r1, [%d7+1032];").any()


# ---- control


def test_a_loop_of_as_many_turns_as_the_thread_says() -> None:
    got = words(
        """mov.b32 %r1, 0; mov.b32 %r2, 0; bra.uni $test;
        $turn: add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1;
        $test: setp.lt.u32 %p1, %r2, %r0; @%p1 bra $turn;"""
    )
    n = np.arange(32)
    np.testing.assert_array_equal(got, n * (n - 1) // 2)


def test_threads_that_part_meet_again_before_a_warp_s_instruction() -> None:
    got = words(
        """setp.eq.u32 %p1, %r0, 3; mov.b32 %r1, 1; @!%p1 bra $join;
        mov.b32 %r1, 100;
        $join: redux.sync.add.u32 %r1, %r1, -1;"""
    )
    assert set(got) == {131}


def test_lanes_that_come_early_wait_for_their_warp() -> None:
    got = words(
        """mov.b64 %d4, tile; add.s64 %d5, %d4, %d9; st.shared.b32 [%d5], %r0; bar.sync 0;
        and.b32 %r2, %r0, 7; mul.wide.u32 %d6, %r2, 16; add.s64 %d6, %d4, %d6;
        setp.eq.u32 %p1, %r2, 0; bra.uni $part;
        $meet: ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%d6]; bra.uni $out;
        $part: @%p1 bra $meet; add.u32 %r3, %r0, 1; bra.uni $meet;
        $out:"""
    )
    np.testing.assert_array_equal(got, np.arange(32))


def test_a_guard_leaves_the_others_alone() -> None:
    got = words("mov.b32 %r1, 5; setp.lt.u32 %p1, %r0, 4; @%p1 mov.b32 %r1, 6;")
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 4, 6, 5))


def test_a_warp_s_instruction_by_some_of_its_lanes() -> None:
    with pytest.raises(Fault, match="not by all lanes"):
        words(
            """setp.eq.u32 %p1, %r0, 0; mov.b64 %d4, tile;
            @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%d4];"""
        )


def test_a_barrier_that_some_threads_skip() -> None:
    with pytest.raises(Deadlock):
        words("setp.lt.u32 %p1, %r0, 32; mov.b32 %r1, 0; @%p1 bar.sync 1;", threads=64)


def test_a_loop_without_end() -> None:
    with pytest.raises(Deadlock, match="more than"):
        words("mov.b32 %r1, 0; $again: bra.uni $again;")


def test_shuffles() -> None:
    lanes = np.arange(32)
    for code, expected in [
        ("bfly.b32 %r1, %r0, 5, 31", lanes ^ 5),
        ("idx.b32 %r1, %r0, 3, 0x181f", lanes // 8 * 8 + 3),
        ("up.b32 %r1, %r0, 2, 0", np.where(lanes < 2, lanes, lanes - 2)),
        ("down.b32 %r1, %r0, 4, 31", np.where(lanes > 27, lanes, lanes + 4)),
    ]:
        np.testing.assert_array_equal(words(f"shfl.sync.{code}, -1;"), expected)


def test_votes_and_election() -> None:
    got = words("setp.gt.u32 %p1, %r0, 29; vote.sync.ballot.b32 %r1, %p1, -1;")
    assert set(got) == {0xC0000000}
    got = words("mov.b32 %r1, 0; elect.sync %r2|%p1, -1; @%p1 mov.b32 %r1, 1;", threads=64)
    assert list(np.flatnonzero(got)) == [0, 32]


def test_atomic_sums() -> None:
    total = np.zeros(4, np.float32)
    code = "and.b32 %r1, %r0, 3; mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d0, %d2;"
    run(code + "red.global.add.f32 [%d2], 0f3F800000;", total, threads=64, grid=3)
    np.testing.assert_array_equal(total, 48.0)


def test_functions_local_and_constant_memory() -> None:
    outside = """
    .const .align 4 .b32 table[4] = {10, 20, 30, 40};
    .func (.param .b32 result) pick(.param .b32 index)
    {
        .reg .b32 %r<5>; .reg .b64 %d<5>; .reg .pred %p<2>;
        ld.param.b32 %r1, [index];
        setp.gt.u32 %p1, %r1, 3; mov.b32 %r2, 0; @%p1 bra $out;
        mul.wide.u32 %d1, %r1, 4; mov.b64 %d2, table; add.s64 %d1, %d1, %d2;
        ld.const.b32 %r2, [%d1];
        $out: st.param.b32 [result], %r2;
        ret;
    }"""
    code = """.local .align 8 .b8 depot[16]; mov.b64 %d2, depot; cvta.local.u64 %d3, %d2;
    { .param .b32 index; st.param.b32 [index+0], %r0; .param .b32 result;
      call.uni (result), pick, (index); ld.param.b32 %r4, [result+0]; }
    st.local.b32 [%d2+4], %r4; ld.b32 %r1, [%d3+4];"""
    expected = np.where(np.arange(32) < 4, (np.arange(32) + 1) * 10, 0)
    np.testing.assert_array_equal(words(code, outside=outside), expected)


def test_registers_of_a_block_of_inline_assembly() -> None:
    code = "mov.b32 %r2, 4; { .reg .pred p; .reg .b32 t; setp.eq.b32 p, %r2, 4;"
    code += "selp.b32 t, 8, 9, p; mov.b32 %r1, t; }"
    assert set(words(code)) == {8}


# ---- memory


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("add.s64 %d2, %d0, %d9; ld.global.b32 %r1, [%d2+4];", "out of bounds"),
        ("ld.global.b32 %r1, [%d0+-4];", "out of bounds"),
        ("ld.global.v2.b32 {%r1, %r2}, [%d0+4];", "not aligned"),
        ("mov.b64 %d2, tile; st.shared.b32 [%d2+2048], %r0;", "out of bounds"),
        ("mov.b64 %d2, tile; ld.shared.b32 %r1, [%d2+4];", "read before anything wrote it"),
    ],
)
def test_faults_name_the_instruction(code, message) -> None:
    with pytest.raises(Fault, match=rf"{message}.*(ld|st)\."):
        words(code + "mov.b32 %r1, 0;")


EXCHANGE = """mov.b64 %d4, tile; add.s64 %d5, %d4, %d9; st.shared.b32 [%d5], %r0;
    {between}
    xor.b32 %r2, %r0, {partner}; mul.wide.u32 %d6, %r2, 4; add.s64 %d6, %d4, %d6;
    ld.shared.b32 %r1, [%d6]; {after}"""


@pytest.mark.parametrize(
    ("between", "partner", "races"),
    [
        ("bar.sync 0;", 33, False),
        ("", 0, False),
        ("", 1, True),
        ("", 32, True),
        ("bar.warp.sync -1;", 1, False),
        ("bar.warp.sync -1;", 32, True),
        ("mov.b32 %r7, 5; and.b32 %r8, %r0, 64; add.u32 %r7, %r7, %r8; shr.u32 %r7, %r7, 5;"
         "add.u32 %r7, %r7, 1; bar.sync %r7, 64;", 32, False),
        ("mov.b32 %r7, 5; and.b32 %r8, %r0, 64; add.u32 %r7, %r7, %r8; shr.u32 %r7, %r7, 5;"
         "add.u32 %r7, %r7, 1; bar.sync %r7, 64;", 64, True),
    ],
)  # fmt: skip
def test_reads_need_a_barrier_after_the_write(between, partner, races) -> None:
    code = EXCHANGE.format(between=between, partner=partner, after="")
    if races:
        with pytest.raises(Race, match=r"after its write by.*ld\.shared"):
            words(code, threads=128)
    else:
        np.testing.assert_array_equal(words(code, threads=128), np.arange(128) ^ partner)


@pytest.mark.parametrize(("after", "races"), [("", True), ("bar.sync 0;", False)])
def test_writes_need_a_barrier_after_the_read(after, races) -> None:
    code = EXCHANGE.format(between="bar.sync 0;", partner=32, after=after)
    code += "st.shared.b32 [%d5], %r1;"
    if races:
        with pytest.raises(Race, match="after its read by"):
            words(code, threads=64)
    else:
        words(code, threads=64)


def test_all_may_read_one_word_or_write_the_same() -> None:
    code = "mov.b64 %d4, tile; mov.b32 %r2, 9; st.shared.b32 [%d4], %r2; bar.sync 0;"
    assert set(words(code + "ld.shared.b32 %r1, [%d4];", threads=64)) == {9}
    with pytest.raises(Race, match="written otherwise"):
        words("mov.b64 %d4, tile; st.shared.b32 [%d4], %r0; mov.b32 %r1, 0;")


def test_shared_memory_by_its_generic_address() -> None:
    code = "mov.b64 %d4, tile; cvta.shared.u64 %d5, %d4; add.s64 %d6, %d5, %d9;"
    got = words(code + "st.b32 [%d6], %r0; add.s64 %d7, %d4, %d9; ld.shared.b32 %r1, [%d7];")
    np.testing.assert_array_equal(got, np.arange(32))


@pytest.mark.parametrize(
    "code",
    ["tex.1d.v4.f32.s32 %r1, [t];", "prmt.b32.f4e %r1, %r2, %r3, %r4;", "add.cc.u32 %r1, 1;"],
)
def test_an_unknown_instruction_is_named(code) -> None:
    with pytest.raises(Unsupported, match=code.split()[0]):
        words(code)
