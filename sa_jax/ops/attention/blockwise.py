"""Fused attention in plain JAX: online softmax over blocks, O(T) memory forward and backward, on any device.

The forward pass keeps, per query, a running maximum, a running sum and an accumulator (Milakov & Gimelshein, arXiv
1805.02867); the backward pass recomputes each block of weights from the log-sum-exp (Dao et al., arXiv 2205.14135,
algorithm 4). Loops over blocks run from the window's edge to the diagonal, so what is masked costs nothing.
"""

import functools

import jax
import jax.numpy as jnp

from sa_jax.ops.attention.reference import MASKED, visible
from sa_jax.ops.attention.spec import AttentionSpec

_BLOCK = 256


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, spec: AttentionSpec, block: int = _BLOCK
) -> jax.Array:
  """Blockwise attention; shapes as in `sa_jax.ops.attend`. ``block`` is the block length in tokens."""
  batch, length, heads, head_dim = q.shape
  block = min(block, length)
  padded = -length % block
  pad = lambda x: jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0)))
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  grouped = pad(q).reshape(batch, length + padded, k.shape[2], heads // k.shape[2], head_dim)
  out = _attend(grouped, pad(k), pad(v), lengths, spec, block)
  return out[:, :length].reshape(q.shape)


def _blocks(x: jax.Array, block: int) -> jax.Array:
  """``[B, T, ...]`` → ``[T / block, B, block, ...]``."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _unblocks(x: jax.Array) -> jax.Array:
  """The inverse of `_blocks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scores(
  q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, lengths: jax.Array, spec: AttentionSpec
) -> jax.Array:
  """Masked float32 scores ``[B, K, G, block, block]`` of query block ``i`` against key block ``j``."""
  block, head_dim = q.shape[1], q.shape[-1]
  scores = spec.scores(jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32), head_dim)
  seen = visible(i * block + jnp.arange(block), j * block + jnp.arange(block), lengths, spec.window)
  return jnp.where(seen[:, None, None], scores, MASKED)


def _first_key_block(i: jax.Array, block: int, spec: AttentionSpec) -> jax.Array | int:
  """The first key block that some query of block ``i`` sees."""
  return 0 if spec.window is None else jnp.maximum(i * block - (spec.window - 1), 0) // block


def _end_query_block(j: jax.Array, block: int, spec: AttentionSpec, blocks: int) -> jax.Array | int:
  """One past the last query block that sees some key of block ``j``."""
  return blocks if spec.window is None else jnp.minimum((j * block + block + spec.window - 2) // block + 1, blocks)


def _to_heads_last(x: jax.Array) -> jax.Array:
  """``[B, K, G, T]`` → ``[B, T, K, G]``."""
  return jnp.moveaxis(x, 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, spec: AttentionSpec, block: int) -> jax.Array:
  return _forward(q, k, v, lengths, spec, block)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, spec: AttentionSpec, block: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Output ``[B, T, K, G, H]`` and the residuals of the backward pass."""
  q_blocks, k_blocks, v_blocks = _blocks(q, block), _blocks(k, block), _blocks(v, block)

  def query_block(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
    i, q_i = inputs

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      accumulated, maximum, total = carry
      scores = _scores(q_i, k_blocks[j], i, j, lengths, spec)
      new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
      weights = jnp.exp(scores - new_maximum[..., None])
      shrink = jnp.exp(maximum - new_maximum)
      values = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v_blocks[j], preferred_element_type=jnp.float32)
      accumulated = accumulated * _to_heads_last(shrink)[..., None] + values
      return accumulated, new_maximum, total * shrink + weights.sum(axis=-1)

    batch, _, kv_heads, group, head_dim = q_i.shape
    rows = (batch, kv_heads, group, block)
    start = (
      jnp.zeros((batch, block, kv_heads, group, head_dim), jnp.float32),
      jnp.full(rows, MASKED, jnp.float32),
      jnp.zeros(rows, jnp.float32),
    )
    accumulated, maximum, total = jax.lax.fori_loop(_first_key_block(i, block, spec), i + 1, key_block, start)
    out = accumulated / _to_heads_last(total)[..., None]
    return carry, (out.astype(v.dtype), maximum + jnp.log(total))

  _, (out, log_sums) = jax.lax.scan(query_block, None, (jnp.arange(len(q_blocks)), q_blocks))
  out = _unblocks(out)
  return out, (q, k, v, lengths, out, log_sums)


def _backward(
  spec: AttentionSpec, block: int, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  q, k, v, lengths, out, log_sums = residuals
  q_blocks, k_blocks, v_blocks, d_out_blocks = (_blocks(x, block) for x in (q, k, v, d_out))
  # D = rowsum(dO ∘ O), the softmax Jacobian's rank-one part.
  inner = jnp.einsum("BTKGH,BTKGH->BKGT", d_out, out, preferred_element_type=jnp.float32)
  inner_blocks = jnp.moveaxis(inner.reshape(*inner.shape[:3], -1, block), 3, 0)
  scale = spec.scale_for(q.shape[-1])

  def key_block(dq: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    j, k_j, v_j = inputs

    def query_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      dq, dk_j, dv_j = carry
      scores = _scores(q_blocks[i], k_j, i, j, lengths, spec)
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

    zeros = jnp.zeros(k_j.shape, jnp.float32)
    dq, dk_j, dv_j = jax.lax.fori_loop(
      j, _end_query_block(j, block, spec, len(q_blocks)), query_block, (dq, zeros, zeros)
    )
    return dq, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

  dq, (dk, dv) = jax.lax.scan(
    key_block, jnp.zeros(q_blocks.shape, jnp.float32), (jnp.arange(len(k_blocks)), k_blocks, v_blocks)
  )
  return _unblocks(dq).astype(q.dtype), _unblocks(dk), _unblocks(dv), None


_attend.defvjp(_forward, _backward)
