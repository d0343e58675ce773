"""What programs move, read from the text of their HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unipic_jax.core import mesh as meshes
from unipic_jax.plan import hlo

LAYERS, ROWS, WIDTH = 5, 64, 128

TEXT = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%taken (p0: f32[6,8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
}

%until (c: (s32[], f32[6,8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %c = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[6,8,128])) -> (s32[], f32[6,8,128]) {
  %s = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  %stack = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %layer = f32[8,128]{1,0:T(8,128)} fusion(%stack, %j), kind=kLoop, calls=%taken
  %start = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0}) all-gather-start(%layer), \
replica_groups=[2,4]<=[8]
  %all = f32[32,128]{1,0:T(8,128)} all-gather-done(%start)
  %near = f32[32,128]{1,0:T(8,128)S(1)} copy(%all)
  %part = ((f32[32,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%all), slice={[8:16], [0:128]}
  %fetched = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%part)
  %back = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%fetched)
  %far = f32[8,128]{1,0:T(8,128)} copy-done(%back)
  ROOT %next = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}) tuple(%j, %stack)
}

ENTRY %main (x: f32[6,8,128]) -> f32[6,8,128] {
  %x = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %start.0 = s32[]{:T(128)} constant(0)
  %state = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}) tuple(%start.0, %x)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="k", backend_config={"body":"a
}}, text of a kernel"}
  %loop = (s32[]{:T(128)}, f32[6,8,128]{2,1,0}) while(%state), condition=%until, body=%body
  %sums = (bf16[100]{0}, f32[10]{0}) all-reduce(%kernel, %kernel), to_apply=%add, \
replica_groups=mesh['data'=2,'fsdp'=4], device_ids=([8]) {'data','fsdp'}
  ROOT %out = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_loops_count_as_often_as_they_run():
    """The bound is that of the loop's condition; a start and its end count once."""
    gather, reduce = hlo.collectives(TEXT)
    assert gather == ("all-gather", 4, 6, 6 * 32 * 128 * 4, False)
    assert reduce == ("all-reduce", 8, 1, 100 * 2 + 10 * 4, False)


def test_slices_and_near_memory_in_the_traffic():
    layer, gathered, stack = 8 * 128 * 4, 32 * 128 * 4, 6 * 8 * 128 * 4
    index = 4
    each = layer + layer + index  # the slice that is read, what is written, and where it is
    each += layer + gathered  # the gather's operand, and what it makes
    each += gathered  # read by the copy, which writes to a memory that is near
    each += layer + layer  # a slice fetched from far, and written back to there
    reduced = 100 * 2 + 10 * 4 + 2 * 8 * 4
    assert hlo.traffic(TEXT) == 6 * each + (stack + 8 * 4) + reduced


NESTED = """HloModule m

%row (r0: f32[6,8,128], r1: s32[]) -> f32[8,128] {
  %r0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %r1 = s32[]{:S(2)} parameter(1)
  %nought = s32[] constant(0)
  %cut = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%r0, %r1, %nought, %nought)
  ROOT %even = f32[8,128]{1,0:T(8,128)} bitcast(%cut)
}

%same (q0: f32[4,8,128]) -> f32[32,128] {
  %q0 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %flat = f32[32,128]{1,0:T(8,128)} bitcast(%q0)
}

%product (m0: f32[6,8,128], m1: s32[], m2: f32[4,8,128]) -> f32[8,32] {
  %m0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %m1 = s32[]{:S(2)} parameter(1)
  %m2 = f32[4,8,128]{2,1,0:T(8,128)} parameter(2)
  %layer = f32[8,128]{1,0:T(8,128)} fusion(%m0, %m1), kind=kLoop, calls=%row
  %other = f32[32,128]{1,0:T(8,128)} fusion(%m2), kind=kLoop, calls=%same
  ROOT %made = f32[8,32]{1,0:T(8,128)} dot(%layer, %other), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}
}

ENTRY %main (x: f32[6,8,128], i: s32[], y: f32[4,8,128]) -> f32[8,32] {
  %x = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %y = f32[4,8,128]{2,1,0:T(8,128)} parameter(2)
  ROOT %out = f32[8,32]{1,0:T(8,128)} fusion(%x, %i, %y), kind=kOutput, calls=%product
}
"""


def test_slices_in_fusions_within_fusions():
    """Of a stack the layer that is taken; of what is only given another shape all."""
    assert hlo.traffic(NESTED) == 4 * (8 * 128 + 4 * 8 * 128 + 8 * 32)


ACROSS = """HloModule m

ENTRY %main (x: f32[64,8,128]) -> f32[64,8,128] {
  %x = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[64,8,128]{2,1,0:T(8,128)} get-tuple-element(%recv), index=0
}
"""


def test_what_crosses_slices():
    """As the TPU's compiler writes it: by way of the hosts, a send and what comes back."""
    assert hlo.collectives(ACROSS) == [("all-reduce", 2, 1, 64 * 8 * 128 * 4, True)]


DIVIDED = """HloModule m

%begin (a0: f32[8,128]) -> (f32[8,128], f32[32,128], s32[2]) {
  %a0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all.1 = f32[32,128]{1,0:T(8,128)} all-gather(%a0), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %to.1 = (f32[8,128], f32[32,128], s32[2]) custom-call(%all.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (b0: f32[8,128], b1: f32[32,128]) -> (f32[8,128], f32[32,128]) {
  %b0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b1 = f32[32,128]{1,0:T(8,128)} parameter(1)
  %twice = f32[8,128]{1,0:T(8,128)} add(%b0, %b0)
  %all.2 = f32[32,128]{1,0:T(8,128)} all-gather(%b0), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %to.2 = (f32[8,128], f32[32,128]) tuple(%twice, %all.2)
}

%end (c0: f32[8,128], c1: f32[32,128]) -> f32[32,128] {
  %c0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %c1 = f32[32,128]{1,0:T(8,128)} parameter(1)
  %all.3 = f32[32,128]{1,0:T(8,128)} all-gather(%c0), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %to.3 = f32[32,128]{1,0:T(8,128)} custom-call(%c0, %c1, %all.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8,128]) -> f32[32,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = (f32[8,128], f32[32,128], s32[2]) fusion(%x), kind=kCustom, calls=%begin
  %space = f32[32,128]{1,0:T(8,128)} get-tuple-element(%start), index=1
  %step = (f32[8,128], f32[32,128]) fusion(%x, %space), kind=kOutput, calls=%beside
  %rest = f32[32,128]{1,0:T(8,128)} get-tuple-element(%step), index=1
  ROOT %out = f32[32,128]{1,0:T(8,128)} fusion(%x, %rest), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_is_divided_among_fusions_counts_once():
    """As the TPU's compiler hides one behind others' work: all three fusions hold it."""
    assert hlo.collectives(DIVIDED) == [("all-gather", 4, 1, 32 * 128 * 4, False)]


@pytest.mark.parametrize(("groups", "size"), [
    ("replica_groups={{0,1},{2,3}}", 2), ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['a'=2,'b'=3] {'b'}", 3), ("channel_id=1", 1)])
def test_sizes_of_groups(groups, size):
    assert hlo.group_size(groups) == size


def test_a_compiled_program():
    """Layers gathered in a scan, on 8 devices of which 4 share the weights."""
    mesh = meshes.make(data=2, fsdp=4)
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32,
                             sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=meshes.batch_sharding(mesh, 2))

    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ meshes.gather(w)), None), x, w)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(w, x).compile().as_text()
    found = [m for m in hlo.collectives(text) if m.kind == "all-gather"]
    assert [(m.group, m.count, m.size) for m in found] == [
        (4, LAYERS, LAYERS * WIDTH * WIDTH * 4)]
    least = LAYERS * (2 * WIDTH * WIDTH + 2 * ROWS // 8 * WIDTH) * 4  # whole weights, rows
    assert least < hlo.traffic(text) < 4 * least
