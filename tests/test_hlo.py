"""Collectives read off compiled text: programs whose communication is known, and the TPU compiler's disguises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sa_jax.hlo import Collective, collectives


def test_collectives_of_a_known_program_are_counted_once_an_iteration():
  mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

  @jax.jit
  @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
  def program(x):
    def outer(x, _):
      x, _ = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.ppermute(x, "x", [(0, 1), (1, 0)])), None), x, length=3)
      return x * jax.lax.psum(x, "x"), None

    x, _ = jax.lax.scan(outer, x, length=5)
    return x + jax.lax.all_gather(x, "x").sum(axis=0)

  text = program.lower(jax.ShapeDtypeStruct((4 * 6, 8), jnp.float32)).compile().as_text()
  array = 6 * 8 * 4
  assert collectives(text) == (
    Collective("all-gather", 1, 4 * array),
    Collective("all-reduce", 5, 5 * array),
    Collective("collective-permute", 15, 15 * array),
  )


TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[512,256]) -> bf16[256,256] {
  %input = bf16[512,256]{1,0} parameter(0)
  %all-reduce.1 = bf16[512,256]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[256,256]{1,0} dynamic-slice(%all-reduce.1)
}

%start (param: bf16[64,8]) -> (bf16[64,8], bf16[128,8], u32[]) {
  %all-gather.1 = bf16[128,8]{1,0} all-gather(%param), channel_id=7, dimensions={0}
}

%middle (param: bf16[64,8]) -> (bf16[128,8], bf16[8,8]) {
  %all-gather.2 = bf16[128,8]{1,0} all-gather(%param), channel_id=7, dimensions={0}
}

%done (param: bf16[64,8]) -> bf16[128,8] {
  %all-gather.3 = bf16[128,8]{1,0} all-gather(%param), channel_id=7, dimensions={0}
}

%condition (carry: (s32[], bf16[64,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (carry: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %async-collective-start.1 = (bf16[64,8], bf16[128,8], u32[]) fusion(%x), kind=kCustom, calls=%start
  %fusion.1 = (bf16[128,8], bf16[8,8]) fusion(%y), kind=kOutput, calls=%middle
  %async-collective-done.1 = bf16[128,8] fusion(%z), kind=kCustom, calls=%done
}

ENTRY %main (p: bf16[512,256]) -> bf16[256,256] {
  %while.1 = (s32[], bf16[64,8]) while(%tuple), condition=%condition, body=%body
  %collective-permute-start = (f32[16], f32[16], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=9
  %collective-permute-done = f32[16] collective-permute-done(%collective-permute-start)
  %send = (f32[30,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%g, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %fusion.2 = bf16[256,256]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_disguised_collectives_of_the_tpu_compiler():
  assert collectives(TPU_TEXT) == (
    Collective("all-gather", 24, 24 * 128 * 8 * 2),
    Collective("reduce-scatter", 1, 512 * 256 * 2),
    Collective("collective-permute", 1, 16 * 4),
    Collective("all-reduce between slices", 1, 30 * 8 * 128 * 4),
  )
