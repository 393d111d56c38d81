"""Reading the compiler's output, on a program small enough to count by hand."""

import pytest

from mqa_jax.measure.hlo import Collectives, Program

HLO = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[4,8]) -> bf16[2,8] {
  %all-reduce.9 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, \
replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}, to_apply=%add
  ROOT %slice = bf16[2,8]{1,0} dynamic-slice(%all-reduce.9, %i)
}

%fused_a (p: f32[3,5]) -> f32[3,20] {
  ROOT %all-gather.3 = f32[3,20]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8]
}

%fused_b (p: f32[3,5]) -> f32[3,20] {
  %inner = s32[7]{0} custom-call(%p), custom_call_target="AssumeGatherIndicesInBound"
  ROOT %all-gather.4 = f32[3,20]{1,0:S(1)} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8]
}

%deep (p: f32[6]) -> f32[6] {
  ROOT %permute = (f32[6]{0}, f32[6]{0}) collective-permute-start(%p), \
source_target_pairs={{0,1},{1,2}}
}

%body.2 (state: (s32[], f32[6])) -> (s32[], f32[6]) {
  %call = f32[6]{0} call(%x), to_apply=%deep
  %reduced = (f32[], /*index=1*/f32[3]{0}) all-reduce(%a, %b), \
replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}, to_apply=%add
}

ENTRY %main.1 (p: f32[2]) -> f32[2] {
  %gather = (bf16[2,3]{1,0}, bf16[8,3]{1,0}) all-gather-start(%p), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[8,3]{1,0} all-gather-done(%gather)
  %scattered = pred[2,5]{1,0} reduce-scatter(%p), channel_id=6, replica_groups={{0,1},{2,3}}
  %everywhere = f32[10]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  %loop = (s32[], f32[6]{0}) while(%init), condition=%cond, body=%body.2
  %one = bf16[2,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %two = f32[3,20]{1,0} fusion(%p), kind=kLoop, calls=%fused_a
  %three = f32[3,20]{1,0} fusion(%p), kind=kLoop, calls=%fused_b
  %combined = u64[]{:T(128)} custom-call(%low, %high), custom_call_target="X64Combine"
  ROOT %again = u64[]{:T(128)} custom-call(%low, %high), custom_call_target="X64Combine"
}
"""


def test_collectives_are_counted_once_with_their_larger_side():
    assert set(Program(HLO).collectives(device_count=8)) == {
        # 2 bytes * 8 * 3 of the start whose type holds 2 * 3 more, and 4 * 3 * 20 of two fusions
        # that share a channel.
        Collectives("all-gather", 4, False, 2, 48 + 240),
        Collectives("reduce-scatter", 2, False, 2, 2 * 10 + 2 * 4 * 8),
        Collectives("all-reduce", 8, False, 1, 40),
        Collectives("all-reduce", 4, True, 1, 4 + 12),
        Collectives("collective-permute", 2, True, 1, 24),
    }
    sizes = [found.num_bytes for found in Program(HLO).collectives(8)]
    assert sizes == sorted(sizes, reverse=True)


def test_custom_calls_are_left_out_of_the_estimate():
    # Two of them are operations of their own; the third is part of a fusion.
    assert Program(HLO).estimated_seconds(-1.75) == pytest.approx(0.25)
    assert Program(HLO).estimated_seconds(-2.5) is None
    looped = HLO.replace(
        "%call = ", '%c = u64[] custom-call(%x), custom_call_target="X"\n  %call = '
    )
    assert Program(looped).estimated_seconds(-1.75) is None
