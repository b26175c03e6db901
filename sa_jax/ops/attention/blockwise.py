"""Fused attention in plain JAX: online softmax over blocks, O(T) memory forward and backward, on any device.

The forward pass keeps, per query, a running maximum, a running sum and an accumulator (Milakov & Gimelshein, arXiv
1805.02867); the backward pass recomputes each block of weights from the log-sum-exp (Dao et al., arXiv 2205.14135,
algorithm 4). Loops over blocks run from the window's edge to the diagonal, so fully masked blocks cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sa_jax.ops.attention.group import Gathered
from sa_jax.ops.attention.reference import MASKED, Segments, segments_at, visible
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec
from sa_jax.trees import Tree

_BLOCK = 256


class _Visibility(NamedTuple):
  """`Rows` in the form that blocks need.

  Attributes:
    lengths: int32 ``[B]``.
    offset: int32 ``[]``, the slot of the first query among the keys.
    segments: document ids of queries and keys, or None.
  """

  lengths: jax.Array
  offset: jax.Array
  segments: Segments | None


class _Static(NamedTuple):
  """Static options.

  Attributes:
    spec: window, soft cap and scale.
    block: tokens per block.
    causal: whether keys after a query's own slot are hidden from it.
  """

  spec: AttentionSpec
  block: int
  causal: bool


class _Call(NamedTuple):
  """The arguments of `attend`, padded to whole blocks.

  Attributes:
    q: ``[B, T, K, G, H]``.
    k: ``[B, S, K, H]``.
    sinks: float32 ``[K, G]``, or None.
    visibility: which keys the queries may see.
    how: static options.
  """

  q: jax.Array
  k: jax.Array
  sinks: jax.Array | None
  visibility: _Visibility
  how: _Static

  @classmethod
  def of(cls, q: jax.Array, k: jax.Array, rows: Rows, spec: AttentionSpec, block: int = _BLOCK) -> _Call:
    """From the arguments of `attend`."""
    batch, length = q.shape[:2]
    block = min(block, length)
    keys = jnp.full((batch,), k.shape[1], jnp.int32)
    lengths = keys if rows.lengths is None else jnp.minimum(rows.lengths.astype(jnp.int32), keys)
    pair = None
    if rows.segments is not None:
      pair = (_filled(segments_at(rows.segments, rows.positions(length)), block), _filled(rows.segments, block))
    sinks = None if rows.sinks is None else rows.sinks.astype(jnp.float32).reshape(k.shape[2], -1)
    visibility = _Visibility(lengths, jnp.int32(0) if rows.offset is None else rows.offset, pair)
    how = _Static(spec, block, rows.causal)
    return cls(_grouped(q, k.shape[2], block), _filled(k, block), sinks, visibility, how)

  def keys(self, x: jax.Array) -> jax.Array:
    """Pads values ``[B, S, K, R]`` to whole blocks."""
    return _filled(x, self.how.block)

  def queries(self, x: jax.Array) -> jax.Array:
    """Brings a per-query array ``[B, T, N, R]`` into the layout of ``q``."""
    return _grouped(x, self.k.shape[2], self.how.block)

  def per_query(self, x: jax.Array) -> jax.Array:
    """Splits per-query scalars ``[B, N, T]`` into blocks ``[T / block, B, K, G, block]``."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.how.block)))
    return jnp.moveaxis(x.reshape(x.shape[0], *self.q.shape[2:4], -1, self.how.block), 3, 0)


def _filled(x: jax.Array, block: int) -> jax.Array:
  """Zero-pads ``[B, T, ...]`` to whole blocks along T."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _grouped(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
  """``[B, T, N, H]`` → ``[B, T, K, G, H]``, padded to whole blocks."""
  x = _filled(x, block)
  return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[3])


def _ungrouped(x: jax.Array, like: jax.Array) -> jax.Array:
  """``[B, T, K, G, H]``, padded to whole blocks, → ``[B, T, N, H]`` with the T and N of ``like``."""
  return x[:, : like.shape[1]].reshape(*like.shape[:3], x.shape[4])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec, block: int = _BLOCK) -> jax.Array:
  """Blockwise attention; shapes as in `sa_jax.ops.attend`. ``block`` is the block length in tokens."""
  if not q.shape[1] * k.shape[1]:
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
  call = _Call.of(q, k, rows, spec, block)
  return _ungrouped(_attend(call.q, call.k, call.keys(v), call.sinks, call.visibility, call.how), q)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
  """`attend`, and each query's log-sum-exp; see `sa_jax.ops.attention.group.Parts`."""
  call = _Call.of(q, k, rows, spec)
  out, (*_, log_sums) = _forward(call.q, call.k, call.keys(v), call.sinks, call.visibility, call.how)
  log_sums = jnp.moveaxis(log_sums, 0, 3)
  return _ungrouped(out, q), log_sums.reshape(q.shape[0], q.shape[2], -1)[..., : q.shape[1]]


def d_values(
  q: jax.Array, k: jax.Array, log_sums: jax.Array, d_out: jax.Array, rows: Rows, spec: AttentionSpec
) -> jax.Array:
  """The gradient of the values; see `sa_jax.ops.attention.group.Parts`."""
  call = _Call.of(q, k, rows, spec)
  d_out_blocks = _blocks(call.queries(d_out), call.how.block)
  backward = _Backward.of(call, call.per_query(log_sums))

  def block(i: jax.Array, j: jax.Array, k_j: jax.Array, carry: tuple[None, jax.Array]) -> tuple[None, jax.Array]:
    _, weights = backward.weights(i, j, k_j)
    return None, carry[1] + _product("BKGTS,BTKGH->BSKH", weights.astype(d_out.dtype), d_out_blocks[i])

  sums = jax.ShapeDtypeStruct((*call.k.shape[:3], d_out.shape[3]), d_out.dtype)
  return backward.over_blocks(block, None, call.k, sums)[1][:, : k.shape[1]]


def d_query_key(
  q: jax.Array, k: jax.Array, gathered: Gathered, rows: Rows, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
  """The gradients of the queries and keys; see `sa_jax.ops.attention.group.Parts`."""
  call = _Call.of(q, k, rows, spec)
  of_layers = lambda cut, x: jnp.moveaxis(jax.vmap(cut)(x), 0, -2)  # [..., L, R], contracted over both
  v = of_layers(call.keys, gathered.v)
  d_out_blocks = _blocks(of_layers(call.queries, gathered.d_out), call.how.block)
  inner = call.per_query(gathered.inner)
  backward = _Backward.of(call, call.per_query(gathered.log_sums))

  def block(
    i: jax.Array, j: jax.Array, of_keys: tuple[jax.Array, jax.Array], carry: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    k_j, v_j = of_keys
    scores, weights = backward.weights(i, j, k_j)
    d_weights = _product("BTKGLH,BSKLH->BKGTS", d_out_blocks[i], v_j)
    return backward.add(i, backward.d_scores(scores, weights, d_weights, inner[i]), k_j, *carry)

  d_q, d_k = backward.over_blocks(block, backward.zeros, (call.k, v), call.k)
  return _ungrouped(_unblocks(d_q).astype(q.dtype), q), d_k[:, : k.shape[1]]


def _blocks(x: jax.Array, block: int) -> jax.Array:
  """``[B, T, ...]`` → ``[T / block, B, block, ...]``."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _unblocks(x: jax.Array) -> jax.Array:
  """The inverse of `_blocks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scores(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, visibility: _Visibility, how: _Static) -> jax.Array:
  """Masked float32 scores ``[B, K, G, block, block]`` of query block ``i`` against key block ``j``."""
  block, head_dim = q.shape[1], q.shape[-1]
  scores = how.spec.scores(jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32), head_dim)
  segments = None
  if visibility.segments is not None:
    of_queries, of_keys = (
      jax.lax.dynamic_slice_in_dim(x, n * block, block, axis=1) for x, n in zip(visibility.segments, (i, j))
    )
    segments = of_queries, of_keys
  positions = jnp.arange(block)
  queries, keys = visibility.offset + i * block + positions, j * block + positions
  seen = visible(queries, keys, visibility.lengths, how.spec.window, segments, how.causal)
  return jnp.where(seen[:, None, None], scores, MASKED)


def _key_blocks(i: jax.Array, offset: jax.Array, how: _Static, blocks: int) -> tuple[jax.Array | int, jax.Array | int]:
  """The range (first, end) of key blocks that queries of block ``i`` see."""
  slot, window = offset + i * how.block, how.spec.window
  last: jax.Array | int = slot + how.block - 1
  if not how.causal:
    last = blocks * how.block - 1 if window is None else last + window - 1
  first = 0 if window is None else jnp.maximum(slot - (window - 1), 0) // how.block
  return first, jnp.minimum(last // how.block + 1, blocks)


def _query_blocks(
  j: jax.Array, offset: jax.Array, how: _Static, blocks: int
) -> tuple[jax.Array | int, jax.Array | int]:
  """The range (first, end) of query blocks that see keys of block ``j``."""
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
def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, visibility: _Visibility, how: _Static
) -> jax.Array:
  return _forward(q, k, v, sinks, visibility, how)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, visibility: _Visibility, how: _Static
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Output ``[B, T, K, G, R]`` and the residuals of the backward pass; sinks are float32 ``[K, G]``."""
  block = how.block
  q_blocks, k_blocks, v_blocks = _blocks(q, block), _blocks(k, block), _blocks(v, block)

  def query_block(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
    i, q_i = inputs

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      accumulated, maximum, total = carry
      scores = _scores(q_i, k_blocks[j], i, j, visibility, how)
      new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
      weights = jnp.exp(scores - new_maximum[..., None])
      shrink = jnp.exp(maximum - new_maximum)
      values = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v_blocks[j], preferred_element_type=jnp.float32)
      accumulated = accumulated * _to_heads_last(shrink)[..., None] + values
      return accumulated, new_maximum, total * shrink + weights.sum(axis=-1)

    batch, _, kv_heads, group, _ = q_i.shape
    queries = (batch, kv_heads, group, block)
    # A sink is an additional key with score `sinks` and value zero, included in the initial state.
    start = (
      jnp.zeros((batch, block, kv_heads, group, v.shape[-1]), jnp.float32),
      jnp.broadcast_to(jnp.float32(MASKED) if sinks is None else sinks[None, :, :, None], queries),
      jnp.full(queries, 0.0 if sinks is None else 1.0, jnp.float32),
    )
    seen = _key_blocks(i, visibility.offset, how, len(k_blocks))
    accumulated, maximum, total = jax.lax.fori_loop(*seen, key_block, start)
    total = jnp.where(total == 0, 1.0, total)  # queries that see no block of keys
    out = accumulated / _to_heads_last(total)[..., None]
    return carry, (out.astype(v.dtype), maximum + jnp.log(total))

  _, (out, log_sums) = jax.lax.scan(query_block, None, (jnp.arange(len(q_blocks)), q_blocks))
  out, log_sums = (checkpoint_name(x, KEPT) for x in (_unblocks(out), log_sums))
  return out, (q, k, v, sinks, visibility, out, log_sums)


class _Backward(NamedTuple):
  """Common state of the blocks of a backward pass.

  Attributes:
    q: ``[T / block, B, block, K, G, H]``.
    log_sums: float32 ``[T / block, B, K, G, block]``.
    visibility: which keys the queries may see.
    how: static options.
  """

  q: jax.Array
  log_sums: jax.Array
  visibility: _Visibility
  how: _Static

  @classmethod
  def of(cls, call: _Call, log_sums: jax.Array) -> _Backward:
    """From a call and its log-sum-exps."""
    return cls(_blocks(call.q, call.how.block), log_sums, call.visibility, call.how)

  @property
  def zeros(self) -> jax.Array:
    """The float32 accumulator of the queries' gradients."""
    return jnp.zeros(self.q.shape, jnp.float32)

  def weights(self, i: jax.Array, j: jax.Array, k_j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Recomputes scores and weights ``[B, K, G, block, block]``."""
    scores = _scores(self.q[i], k_j, i, j, self.visibility, self.how)
    return scores, jnp.exp(scores - self.log_sums[i][..., None])

  def d_scores(self, scores: jax.Array, weights: jax.Array, d_weights: jax.Array, inner: jax.Array) -> jax.Array:
    """The gradient of ``q kᵀ`` from that of the weights; ``inner`` is ``D = rowsum(dO ∘ O)``, ``[B, K, G, block]``."""
    spec = self.how.spec
    d_scores = weights * (d_weights - inner[..., None]) * spec.scale_for(self.q.shape[-1])
    if spec.softcap is not None:
      # The slope of tanh; masked scores lie far outside the cap.
      d_scores *= jnp.clip(1.0 - jnp.square(jnp.maximum(scores, -spec.softcap) / spec.softcap), 0.0)
    return d_scores.astype(self.q.dtype)

  def add(
    self, i: jax.Array, d_scores: jax.Array, k_j: jax.Array, dq: jax.Array, dk_j: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Adds a block's contribution to the gradients of the queries and of that block's keys."""
    dk_j = dk_j + _product("BKGTS,BTKGH->BSKH", d_scores, self.q[i])
    return dq.at[i].add(_product("BKGTS,BSKH->BTKGH", d_scores, k_j)), dk_j

  def over_blocks(
    self, step: Callable[[jax.Array, jax.Array, Tree, Tree], Tree], of_queries: Tree, of_keys: Tree, like: Tree
  ) -> tuple[Tree, Tree]:
    """Accumulates over all blocks of scores that are not fully masked.

    Args:
      step: (i, j, arrays of key block j, (query sums, sums of key block j)) → the updated sums.
      of_queries: initial query sums.
      of_keys: arrays ``[B, S, ...]``, split into key blocks.
      like: shapes and dtypes of the key sums, which are accumulated in float32.

    Returns:
      The query sums and the key sums.
    """
    cut = functools.partial(_blocks, block=self.how.block)
    blocks = jax.tree.map(cut, of_keys)

    def key_block(of_queries: Tree, inputs: tuple[jax.Array, Tree]) -> tuple[Tree, Tree]:
      j, of_j = inputs
      zeros = jax.tree.map(lambda x: jnp.zeros((x.shape[0], self.how.block, *x.shape[2:]), jnp.float32), like)
      seen = _query_blocks(j, self.visibility.offset, self.how, len(self.q))
      of_queries, sums = jax.lax.fori_loop(*seen, lambda i, carry: step(i, j, of_j, carry), (of_queries, zeros))
      return of_queries, jax.tree.map(lambda x, like: x.astype(like.dtype), sums, like)

    count = len(jax.tree.leaves(blocks)[0])
    of_queries, sums = jax.lax.scan(key_block, of_queries, (jnp.arange(count), blocks))
    return of_queries, jax.tree.map(_unblocks, sums)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _backward(how: _Static, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
  q, k, v, sinks, visibility, out, log_sums = residuals
  backward = _Backward(_blocks(q, how.block), log_sums, visibility, how)
  d_out_blocks = _blocks(d_out, how.block)
  # D = rowsum(dO ∘ O), the softmax Jacobian's rank-one part.
  inner = _product("BTKGH,BTKGH->BKGT", d_out, out)
  inner_blocks = jnp.moveaxis(inner.reshape(*inner.shape[:3], -1, how.block), 3, 0)

  def block(
    i: jax.Array, j: jax.Array, of_keys: tuple[jax.Array, jax.Array], carry: tuple[jax.Array, Tree]
  ) -> tuple[jax.Array, Tree]:
    (k_j, v_j), (dq, (dk_j, dv_j)) = of_keys, carry
    scores, weights = backward.weights(i, j, k_j)
    d_weights = _product("BTKGH,BSKH->BKGTS", d_out_blocks[i], v_j)
    dv_j = dv_j + _product("BKGTS,BTKGH->BSKH", weights.astype(v.dtype), d_out_blocks[i])
    dq, dk_j = backward.add(i, backward.d_scores(scores, weights, d_weights, inner_blocks[i]), k_j, dq, dk_j)
    return dq, (dk_j, dv_j)

  dq, (dk, dv) = backward.over_blocks(block, backward.zeros, (k, v), (k, v))
  d_sinks = None
  if sinks is not None:
    of_sinks = jnp.exp(sinks[None, None, :, :, None] - log_sums)
    d_sinks = -jnp.einsum("nBKGT,nBKGT->KG", of_sinks, inner_blocks)
  return _unblocks(dq).astype(q.dtype), dk, dv, d_sinks, None


_attend.defvjp(_forward, _backward)
