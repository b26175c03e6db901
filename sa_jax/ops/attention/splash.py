"""JAX's splash attention, a fused kernel for TPUs. It is imported lazily."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec

if TYPE_CHECKING:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

_LANES = 128
_BLOCK = 512


def padded_length(length: int) -> int:
  """The length rounded up to whole blocks: a multiple of 128 up to 1024, and of 512 above."""
  unit = _LANES if length <= 2 * _BLOCK else _BLOCK
  return -(-length // unit) * unit


def block_sizes(length: int) -> splash.BlockSizes:
  """Block sizes for a `padded_length`: all of it up to 1024 tokens, then 1024 or 512; compute tiles of up to 512.

  The backward pass computes dQ separately from dK and dV: the fused kernel stores one dQ per block of keys.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  block = length if length <= 2 * _BLOCK else math.gcd(length, 2 * _BLOCK)
  tile = math.gcd(block, _BLOCK)
  return splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=tile,
    block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=tile,
    block_q_dq=block, block_kv_dq=tile,
  )  # fmt: skip


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  *,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention; O(T) memory, without repeating grouped keys and values. Shapes as in `sa_jax.ops.attend`.

  Lengths need no mask: causality hides right padding from a row's tokens, and outputs at padding are ignored.

  Args:
    q: ``[B, T, N, H]``.
    k: ``[B, T, K, H]``.
    v: ``[B, T, K, H]``.
    rows: lengths, segments and sinks only.
    spec: window, soft cap and scale.
    interpret: run the kernels in Pallas's interpreter, on any device.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads, head_dim = q.shape[1:]
  padded = padded_length(length)
  shape = (padded, padded)
  mask = splash.CausalMask(shape) if spec.window is None else splash.LocalMask(shape, (spec.window - 1, 0), offset=0)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=block_sizes(padded),
    attn_logits_soft_cap=spec.softcap,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )
  heads_first = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))
  # The kernel does not scale the scores.
  arrays = heads_first(q * spec.scale_for(head_dim)), heads_first(k), heads_first(v)
  ids = None if rows.segments is None else jnp.pad(rows.segments, ((0, 0), (0, padded - length)))
  segments = None if ids is None else splash.SegmentIds(ids, ids)
  sinks = None if rows.sinks is None else rows.sinks.astype(jnp.float32)
  out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(*arrays, segments, sinks)
  return jnp.swapaxes(out, 1, 2)[:, :length].astype(v.dtype)
