"""A group's shared backward pass on Hopper GPUs (H100, H200), for the cuDNN backend.

It supports full causal rows in half precision with a head dimension of 128. cuDNN computes the forward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sa_jax.ops import kernels
from sa_jax.ops.attention.group import Gathered, Parts
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import AttentionSpec

_WIDTH = 128
"""The supported head dimension."""
_MULTIPLE, _SHORTEST = 256, 4096
"""A row's length in tokens must be a multiple of the first; below the second, the kernels are not faster."""
_SQUARE = 2**31
"""Maximum bytes in memory for the gradients of one head's scores."""


def takes(q: jax.Array, rows: Rows, spec: AttentionSpec) -> bool:
  """Whether these kernels support the call; see `Parts`."""
  plain = rows.lengths is None and not rows.demands and spec.window is None and spec.softcap is None
  shaped = q.shape[1] % _MULTIPLE == 0 and q.shape[1] >= _SHORTEST and q.shape[3] == _WIDTH
  return plain and shaped and q.dtype in (jnp.bfloat16, jnp.float16) and kernels.is_hopper()


def forward(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
  """cuDNN's attention, and each query's log-sum-exp; see `Parts`."""
  del rows  # full and causal
  attend = functools.partial(jax.nn.dot_product_attention, scale=spec.scale, is_causal=True, implementation="cudnn")
  out, backward = jax.vjp(attend, q, k, v)
  # JAX's public output casts the log-sum-exp to half precision; the custom call has it in float32.
  statistic = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  log_sums = [x for x in jax.tree.leaves(backward) if (x.shape, x.dtype) == (statistic.shape, statistic.dtype)]
  if len(log_sums) != 1:
    raise NotImplementedError(
      f"expected one residual like {statistic} from cuDNN's attention; JAX {jax.__version__} has {len(log_sums)}"
    )
  return out, log_sums[0]


def d_values(
  q: jax.Array, k: jax.Array, log_sums: jax.Array, d_out: jax.Array, rows: Rows, spec: AttentionSpec
) -> jax.Array:
  """``Pᵀ dO``; see `Parts`."""
  from sa_jax.ops.attention import hopper_kernels

  del rows  # full and causal
  return hopper_kernels.d_values(q, k, log_sums, d_out, spec.scale_for(q.shape[3]))


def d_query_key(
  q: jax.Array, k: jax.Array, gathered: Gathered, rows: Rows, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
  """Head by head: the gradients of the scores, then their products with keys and queries; see `Parts`."""
  from sa_jax.ops.attention import hopper_kernels

  del rows  # full and causal
  (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
  at_once = max(_MULTIPLE, min(length, _SQUARE // (q.dtype.itemsize * length) // _MULTIPLE * _MULTIPLE))
  scale = spec.scale_for(q.shape[3])

  def of_key_head(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    row, head = index // kv_heads, index % kv_heads
    keys, values = k[row, :, head], gathered.v[:, row, :, head]

    def of_head(d_k: jax.Array, each: jax.Array) -> tuple[jax.Array, jax.Array]:
      of = head * (heads // kv_heads) + each
      queries, d_out = q[row, :, of], gathered.d_out[:, row, :, of]
      inner, log_sums = gathered.inner[row, of], gathered.log_sums[row, of]
      d_q = []
      for start in range(0, length, at_once):
        here, end = slice(start, start + at_once), min(start + at_once, length)
        d_scores = hopper_kernels.d_scores(
          (queries[here], keys[:end]), (d_out[:, here], values[:, :end]), (inner[here], log_sums[here]), scale
        )
        d_q.append(d_scores @ keys[:end])
        d_k = d_k.at[:end].add(jnp.matmul(d_scores.T, queries[here], preferred_element_type=jnp.float32))
      return d_k, jnp.concatenate(d_q)

    d_k, d_q = jax.lax.scan(of_head, jnp.zeros(keys.shape, jnp.float32), jnp.arange(heads // kv_heads))
    return d_q, d_k.astype(k.dtype)

  d_q, d_k = jax.lax.map(of_key_head, jnp.arange(batch * kv_heads))
  d_q = d_q.reshape(batch, heads, length, -1)
  return jnp.swapaxes(d_q, 1, 2), jnp.swapaxes(d_k.reshape(batch, kv_heads, length, -1), 1, 2)


PARTS = Parts(forward, d_values, d_query_key, takes, least=4, partitions=False, narrow=False)
"""For the cuDNN backend. With fewer than four followers, cuDNN's own backward pass per layer is as fast."""
