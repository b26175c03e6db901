"""Fused attention in plain JAX: online softmax over blocks, O(T) memory forward and backward, on any device.

The forward pass keeps, per query, a running maximum, a running sum and an accumulator (Milakov & Gimelshein, arXiv
1805.02867); the backward pass recomputes each block of weights from the log-sum-exp (Dao et al., arXiv 2205.14135,
algorithm 4). Loops over blocks run from the window's edge to the diagonal, so what is masked costs nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sa_jax.ops.attention.reference import MASKED, Segments, segments_at, visible
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec

_BLOCK = 256


class _Sight(NamedTuple):
  """`Rows` as blocks read them.

  Attributes:
    lengths: int32 ``[B]``.
    offset: int32 ``[]``, the slot of the first query among the keys.
    segments: the documents of queries and keys, or None.
  """

  lengths: jax.Array
  offset: jax.Array
  segments: Segments | None


class _How(NamedTuple):
  """What is known before the arrays are.

  Attributes:
    spec: window, soft cap and scale.
    block: tokens in a block.
    causal: whether a query sees no key after its own slot.
  """

  spec: AttentionSpec
  block: int
  causal: bool


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec, block: int = _BLOCK) -> jax.Array:
  """Blockwise attention; shapes as in `sa_jax.ops.attend`. ``block`` is the block length in tokens."""
  batch, length, heads, head_dim = q.shape
  if not length * k.shape[1]:
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
  block = min(block, length)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))
  keys = jnp.full((batch,), k.shape[1], jnp.int32)
  lengths = keys if rows.lengths is None else jnp.minimum(rows.lengths.astype(jnp.int32), keys)
  pair = None
  if rows.segments is not None:
    pair = (pad(segments_at(rows.segments, rows.positions(length))), pad(rows.segments))
  padded = pad(q)
  grouped = padded.reshape(batch, padded.shape[1], k.shape[2], heads // k.shape[2], head_dim)
  sinks = None if rows.sinks is None else rows.sinks.astype(jnp.float32).reshape(k.shape[2], -1)
  sight = _Sight(lengths, jnp.int32(0) if rows.offset is None else rows.offset, pair)
  out = _attend(grouped, pad(k), pad(v), sinks, sight, _How(spec, block, rows.causal))
  return out[:, :length].reshape(*q.shape[:3], v.shape[3])


def _blocks(x: jax.Array, block: int) -> jax.Array:
  """``[B, T, ...]`` → ``[T / block, B, block, ...]``."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _unblocks(x: jax.Array) -> jax.Array:
  """The inverse of `_blocks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scores(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, sight: _Sight, how: _How) -> jax.Array:
  """Masked float32 scores ``[B, K, G, block, block]`` of query block ``i`` against key block ``j``."""
  block, head_dim = q.shape[1], q.shape[-1]
  scores = how.spec.scores(jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32), head_dim)
  segments = None
  if sight.segments is not None:
    of_queries, of_keys = (
      jax.lax.dynamic_slice_in_dim(x, n * block, block, axis=1) for x, n in zip(sight.segments, (i, j))
    )
    segments = of_queries, of_keys
  positions = jnp.arange(block)
  queries, keys = sight.offset + i * block + positions, j * block + positions
  seen = visible(queries, keys, sight.lengths, how.spec.window, segments, how.causal)
  return jnp.where(seen[:, None, None], scores, MASKED)


def _key_blocks(i: jax.Array, offset: jax.Array, how: _How, blocks: int) -> tuple[jax.Array | int, jax.Array | int]:
  """The first and one past the last of the key blocks that queries of block ``i`` see."""
  slot, window = offset + i * how.block, how.spec.window
  last: jax.Array | int = slot + how.block - 1
  if not how.causal:
    last = blocks * how.block - 1 if window is None else last + window - 1
  first = 0 if window is None else jnp.maximum(slot - (window - 1), 0) // how.block
  return first, jnp.minimum(last // how.block + 1, blocks)


def _query_blocks(j: jax.Array, offset: jax.Array, how: _How, blocks: int) -> tuple[jax.Array | int, jax.Array | int]:
  """The first and one past the last of the query blocks that see keys of block ``j``."""
  window = how.spec.window
  slot: jax.Array | int = j * how.block - offset
  end = blocks if window is None else jnp.minimum((slot + how.block + window - 2) // how.block + 1, blocks)
  if not how.causal:
    slot = 0 if window is None else slot - (window - 1)
  return jnp.maximum(slot, 0) // how.block, end


def _to_heads_last(x: jax.Array) -> jax.Array:
  """``[B, K, G, T]`` → ``[B, T, K, G]``."""
  return jnp.moveaxis(x, 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, sight: _Sight, how: _How) -> jax.Array:
  return _forward(q, k, v, sinks, sight, how)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, sight: _Sight, how: _How
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Output ``[B, T, K, G, R]`` and the residuals of the backward pass; sinks are float32 ``[K, G]``."""
  block = how.block
  q_blocks, k_blocks, v_blocks = _blocks(q, block), _blocks(k, block), _blocks(v, block)

  def query_block(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
    i, q_i = inputs

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      accumulated, maximum, total = carry
      scores = _scores(q_i, k_blocks[j], i, j, sight, how)
      new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
      weights = jnp.exp(scores - new_maximum[..., None])
      shrink = jnp.exp(maximum - new_maximum)
      values = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v_blocks[j], preferred_element_type=jnp.float32)
      accumulated = accumulated * _to_heads_last(shrink)[..., None] + values
      return accumulated, new_maximum, total * shrink + weights.sum(axis=-1)

    batch, _, kv_heads, group, _ = q_i.shape
    queries = (batch, kv_heads, group, block)
    # A sink is a key that has been seen already, and whose value is zero.
    start = (
      jnp.zeros((batch, block, kv_heads, group, v.shape[-1]), jnp.float32),
      jnp.broadcast_to(jnp.float32(MASKED) if sinks is None else sinks[None, :, :, None], queries),
      jnp.full(queries, 0.0 if sinks is None else 1.0, jnp.float32),
    )
    seen = _key_blocks(i, sight.offset, how, len(k_blocks))
    accumulated, maximum, total = jax.lax.fori_loop(*seen, key_block, start)
    total = jnp.where(total == 0, 1.0, total)  # of queries that see no block of keys
    out = accumulated / _to_heads_last(total)[..., None]
    return carry, (out.astype(v.dtype), maximum + jnp.log(total))

  _, (out, log_sums) = jax.lax.scan(query_block, None, (jnp.arange(len(q_blocks)), q_blocks))
  out, log_sums = (checkpoint_name(x, KEPT) for x in (_unblocks(out), log_sums))
  return out, (q, k, v, sinks, sight, out, log_sums)


def _backward(how: _How, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
  q, k, v, sinks, sight, out, log_sums = residuals
  spec, block = how.spec, how.block
  q_blocks, k_blocks, v_blocks, d_out_blocks = (_blocks(x, block) for x in (q, k, v, d_out))
  # D = rowsum(dO ∘ O), the softmax Jacobian's rank-one part.
  inner = jnp.einsum("BTKGH,BTKGH->BKGT", d_out, out, preferred_element_type=jnp.float32)
  inner_blocks = jnp.moveaxis(inner.reshape(*inner.shape[:3], -1, block), 3, 0)
  scale = spec.scale_for(q.shape[-1])

  def key_block(dq: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    j, k_j, v_j = inputs

    def query_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      dq, dk_j, dv_j = carry
      scores = _scores(q_blocks[i], k_j, i, j, sight, how)
      weights = jnp.exp(scores - log_sums[i][..., None])
      d_weights = jnp.einsum("BTKGH,BSKH->BKGTS", d_out_blocks[i], v_j, preferred_element_type=jnp.float32)
      d_scores = weights * (d_weights - inner_blocks[i][..., None]) * scale
      if spec.softcap is not None:
        # The slope of tanh; masked scores lie far outside the cap.
        d_scores *= jnp.clip(1.0 - jnp.square(jnp.maximum(scores, -spec.softcap) / spec.softcap), 0.0)
      d_scores = d_scores.astype(q.dtype)
      product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
      dv_j = dv_j + product("BKGTS,BTKGH->BSKH", weights.astype(v.dtype), d_out_blocks[i])
      dk_j = dk_j + product("BKGTS,BTKGH->BSKH", d_scores, q_blocks[i])
      return dq.at[i].add(product("BKGTS,BSKH->BTKGH", d_scores, k_j)), dk_j, dv_j

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k_j, v_j))
    seen = _query_blocks(j, sight.offset, how, len(q_blocks))
    dq, dk_j, dv_j = jax.lax.fori_loop(*seen, query_block, (dq, *zeros))
    return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

  dq, (dk, dv) = jax.lax.scan(
    key_block, jnp.zeros(q_blocks.shape, jnp.float32), (jnp.arange(len(k_blocks)), k_blocks, v_blocks)
  )
  d_sinks = None
  if sinks is not None:
    of_sinks = jnp.exp(sinks[None, None, :, :, None] - log_sums)
    d_sinks = -jnp.einsum("nBKGT,nBKGT->KG", of_sinks, inner_blocks)
  return _unblocks(dq).astype(q.dtype), _unblocks(dk), _unblocks(dv), d_sinks, None


_attend.defvjp(_forward, _backward)
