"""Tests reading the traffic between devices from HLO programs written by hand."""

import pytest

from qlora_jax.gpu.collectives import Collective, Gather, collectives, executions, gathers
from qlora_jax.gpu.hlo import lines
from qlora_jax.gpu.links import LINKS, PCIE_4, link_of
from qlora_jax.gpu.roofline import RATES

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"
TRIPS = 'backend_config={"known_trip_count":{"n":"80"}}'
LOOP = f"""{HEADER}
%multiply (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8]{{1,0}} parameter(0)
  ROOT %dot.1 = bf16[8,8]{{1,0}} dot(%p, %p)
}}

%body (arg: (s32[], u8[64,32])) -> (s32[], u8[64,32]) {{
  %arg = (s32[], u8[64,32]{{1,0}}) parameter(0)
  %part = u8[64,32]{{1,0}} get-tuple-element(%arg), index=1
  %all-gather-start.1 = (u8[64,32]{{1,0}}, u8[256,32]{{1,0}}) all-gather-start(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={{0}}
  %fusion.1 = bf16[8,8]{{1,0}} fusion(%x), kind=kCustom, calls=%multiply
  %all-gather-done.1 = u8[256,32]{{1,0}} all-gather-done(%all-gather-start.1)
  %all-gather-start.2 = ((f32[16]{{0}}, u8[2,4]{{1,0}}), (f32[64]{{0}}, u8[8,4]{{1,0}})) all-gather-start(%a, %b), channel_id=2, replica_groups=[2,4]<=[8], dimensions={{0}}
  %slice.1 = f32[1]{{0}} slice(%a), slice={{[0:1]}}
  %all-gather-done.2 = (f32[64]{{0}}, u8[8,4]{{1,0}}) all-gather-done(%all-gather-start.2)
  %all-gather-start.3 = (u8[64,32]{{1,0}}, u8[256,32]{{1,0}}) all-gather-start(%part), channel_id=4, replica_groups=[2,4]<=[8], dimensions={{0}}
  %all-gather-done.3 = u8[256,32]{{1,0}} all-gather-done(%all-gather-start.3)
  %reduce-scatter-start = (f32[64,8]{{1,0}}, f32[16,8]{{1,0}}) reduce-scatter-start(%c), channel_id=3, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
  ROOT %reduce-scatter-done = f32[16,8]{{1,0}} reduce-scatter-done(%reduce-scatter-start)
}}

ENTRY %main (p0: u8[64,32]) -> f32[] {{
  %while.1 = (s32[], u8[64,32]{{1,0}}) while(%t), condition=%cond, body=%body, {TRIPS}
  %all-reduce.1 = f32[3,16,8]{{2,1,0}} all-reduce(%g), channel_id=5, replica_groups={{}}, to_apply=%add
  ROOT %collective-permute.1 = f32[4]{{0}} collective-permute(%h), channel_id=6, source_target_pairs={{{{0,1}},{{1,0}}}}
}}
"""  # noqa: E501


def test_what_a_loop_gathers_counts_once_a_turn() -> None:
    found = {one[:4]: one for one in collectives(LOOP)}
    assert found == {
        one[:4]: one
        for one in (
            Collective("all-gather", "u8", (256, 32), 4, 160),
            Collective("all-gather", "f32", (64,), 4, 80),
            Collective("all-gather", "u8", (8, 4), 4, 80),
            Collective("reduce-scatter", "f32", (16, 8), 4, 80),
            Collective("all-reduce", "f32", (3, 16, 8), 8, 1),
            Collective("collective-permute", "f32", (4,), 8, 1),
        )
    }
    most = [one.received * one.times for one in collectives(LOOP)]
    assert most == sorted(most, reverse=True)


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        ("all-gather", 64 * 4 * 3 // 4),  # the 3 parts of the other devices
        ("reduce-scatter", 64 * 4 * 3),  # its part from each of the 3 others
        ("all-reduce", 2 * 64 * 4 * 3 // 4),  # reduce-scatter, then all-gather
        ("all-to-all", 64 * 4 * 3 // 4),
        ("collective-permute", 64 * 4),
    ],
)
def test_bytes_on_the_way_round_a_ring(kind: str, received: int) -> None:
    assert Collective(kind, "f32", (16, 4), 4, 1).received == received
    assert Collective("all-gather", "pred", (8,), 2, 1).received == 4
    assert Collective("all-gather", "u8", (8,), 1, 1).received == 0


def test_what_runs_between_start_and_end() -> None:
    assert gathers(LOOP) == [
        Gather(256 * 32 * 3 // 4, 80, 1, 1),
        Gather((64 * 4 + 8 * 4) * 3 // 4, 80, 1, 0),  # a slice is too short to hide it
        Gather(256 * 32 * 3 // 4, 80, 0, 0),
    ]


GENERIC = f"""{HEADER}
%wrapped (p: f32[4]) -> f32[16] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %all-gather.7 = f32[16]{{0}} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={{0}}
}}

ENTRY %main (p0: f32[4]) -> f32[16] {{
  %start = ((f32[4]{{0}}), f32[16]{{0}}) async-start(%p0), calls=%wrapped
  %dot.2 = f32[16,16]{{1,0}} dot(%q, %r)
  ROOT %done = f32[16]{{0}} async-done(%start), calls=%wrapped
}}
"""  # noqa: E501


def test_the_generic_form_of_a_start_counts_once() -> None:
    assert collectives(GENERIC) == [Collective("all-gather", "f32", (16,), 4, 1)]
    assert gathers(GENERIC) == [Gather(48, 1, 1, 1)]


def test_loops_within_loops_and_branches() -> None:
    text = f"""{HEADER}
%inner (a: s32[]) -> s32[] {{
  ROOT %x = s32[] add(%a, %a)
}}

%outer (a: s32[]) -> s32[] {{
  ROOT %w = s32[] while(%a), condition=%c, body=%inner, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}

%left (a: s32[]) -> s32[] {{
  ROOT %y = s32[] add(%a, %a)
}}

ENTRY %main (a: s32[]) -> s32[] {{
  %v = s32[] while(%a), condition=%c, body=%outer, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %b = s32[] conditional(%p, %a, %a), branch_computations={{%left, %inner}}
}}
"""  # noqa: E501
    counts = executions(list(lines(text)))
    assert (counts["outer"], counts["inner"], counts["left"]) == (5, 16, 1)


def test_every_gpu_has_a_link_that_joins_many() -> None:
    assert LINKS.keys() == RATES.keys()
    for links in LINKS.values():
        assert [x.bandwidth for x in links] == sorted((x.bandwidth for x in links), reverse=True)
    assert link_of("a100", 8) == LINKS["a100"][0]
    assert link_of("a6000", 2) == LINKS["a6000"][0]
    assert link_of("a6000", 4) == PCIE_4  # an NVLink bridge joins only two GPUs
    assert link_of("own.txtpb", 2) is None
