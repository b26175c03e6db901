"""Flash attention in Pallas Triton, for what cuDNN does not support: packed rows, soft caps, and query offsets.

With causality, windows, documents and offsets, each query sees one interval of keys, whose ends never decrease along
the queries. Blocks outside the interval are not read, so packed rows cost no more than their documents. Forward and
backward passes follow FlashAttention-2 (Dao, arXiv 2307.08691).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from sa_jax.ops.attention.reference import MASKED, segments_at
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec
from sa_jax.ops.kernels import triton as plgpu
from sa_jax.trees import Tree

BLOCK = 64
"""Queries per block, and keys per block."""

_LOG2_E = math.log2(math.e)


class Bounds(NamedTuple):
  """The keys that each query sees, and the blocks of queries that see each block of keys.

  Attributes:
    first: int32 ``[B, T]``, the first key, non-decreasing along T.
    last: int32 ``[B, T]``, the last key, non-decreasing along T.
    begin: int32 ``[B, S / BLOCK]``, the first block of queries that sees some of these keys.
    end: int32 ``[B, S / BLOCK]``, one past the last.
  """

  first: jax.Array
  last: jax.Array
  begin: jax.Array
  end: jax.Array


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: Rows,
  spec: AttentionSpec,
  interpret: bool = False,
) -> jax.Array:
  """Flash attention; O(T) memory. Shapes as in `sa_jax.ops.attend`.

  Lengths are ignored: causality hides right padding from a row's tokens. ``interpret`` runs the kernels in Pallas's
  interpreter, on any device.
  """
  (batch, queries), keys = q.shape[:2], k.shape[1]
  bounds = _bounds(batch, rows.positions(queries), keys, spec.window, rows.segments)
  pad = lambda x, length: jnp.pad(x, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
  arrays = pad(q, queries), pad(k, keys), pad(v, keys)
  out = _attention(*arrays, rows.sinks, bounds, _Static(spec, interpret))
  return out[:, :queries]


def _bounds(batch: int, positions: jax.Array, keys: int, window: int | None, segments: jax.Array | None) -> Bounds:
  """The bounds of queries at int32 ``positions [T]`` among ``keys`` keys, both padded to whole blocks."""
  last = jnp.broadcast_to(positions.astype(jnp.int32), (batch, positions.size))
  first = jnp.zeros_like(last) if window is None else jnp.maximum(last - (window - 1), 0)
  if segments is not None:
    slots = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    first = jnp.maximum(first, segments_at(starts, positions))
  first, last = (jnp.pad(each, ((0, 0), (0, -positions.size % BLOCK)), mode="edge") for each in (first, last))
  edges = jnp.arange(0, keys, BLOCK, dtype=jnp.int32)
  count = lambda condition: condition.sum(axis=1, dtype=jnp.int32)
  begin = count(last[:, :, None] < edges[None, None]) // BLOCK
  end = (count(first[:, :, None] < edges[None, None] + BLOCK) + BLOCK - 1) // BLOCK
  return Bounds(first, last, begin, end)


class _Static(NamedTuple):
  """Static options: the spec, and whether the kernels are interpreted."""

  spec: AttentionSpec
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, bounds: Bounds, how: _Static
) -> jax.Array:
  return _forward(q, k, v, sinks, bounds, how)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, bounds: Bounds, how: _Static
) -> tuple[jax.Array, tuple[Any, ...]]:
  """The output, and the residuals of the backward pass: the arguments, the output, and each query's log-sum-exp."""
  calls = _Calls(q, k, how.interpret)
  out, log_sums = calls.over_queries(
    functools.partial(_forward_kernel, spec=how.spec),
    [calls.query, (calls.keys, calls.keys), (calls.bound, calls.bound)],
    [(calls.query, q), (calls.per_query, calls.statistic)],
    "flash_forward",
  )(q, (k, v), (bounds.first, bounds.last))
  if sinks is not None:
    # A sink is an additional key whose value is zero: rescale the output to the larger sum.
    without, log_sums = log_sums, jnp.logaddexp2(log_sums, _in_base_2(sinks))
    out = (out * jnp.swapaxes(jnp.exp2(without - log_sums), 1, 2)[..., None]).astype(out.dtype)
  out, log_sums = (checkpoint_name(x, KEPT) for x in (out, log_sums))
  return out, (q, k, v, sinks, bounds, out, log_sums)


def _in_base_2(sinks: jax.Array) -> jax.Array:
  """``[N]`` → float32 ``[1, N, 1]``."""
  return sinks.astype(jnp.float32)[None, :, None] * _LOG2_E


def _backward(how: _Static, residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
  q, k, v, sinks, bounds, out, log_sums = residuals
  spec, calls = how.spec, _Calls(q, k, how.interpret)
  # D = rowsum(dO ∘ O), the row term of the softmax's gradient.
  shared = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
  (d_q,) = calls.over_queries(
    functools.partial(_d_q_kernel, spec=spec),
    [
      *(calls.query, (calls.keys, calls.keys), (calls.bound, calls.bound)),
      _BackwardInputs(calls.query, calls.per_query, calls.per_query),
    ],
    [(calls.query, q)],
    "flash_d_q",
  )(q, (k, v), (bounds.first, bounds.last), _BackwardInputs(d_out, log_sums, shared))
  d_k, d_v = calls.over_keys(
    functools.partial(_d_kv_kernel, spec=spec),
    [
      *(calls.queries, (calls.key, calls.key)),
      (calls.all_bounds, calls.all_bounds, calls.at_key, calls.at_key),
      _BackwardInputs(calls.queries, calls.statistics, calls.statistics),
    ],
    [(calls.key, k), (calls.key, v)],
    "flash_d_kv",
  )(q, (k, v), tuple(bounds), _BackwardInputs(d_out, log_sums, shared))
  d_sinks = None
  if sinks is not None:
    d_sinks = -jnp.einsum("BNT,BNT->N", jnp.exp2(_in_base_2(sinks) - log_sums), shared).astype(sinks.dtype)
  return d_q, d_k, d_v, d_sinks, None


_attention.defvjp(_forward, _backward)


class _Calls:
  """Block specs of the kernels' arguments, and the `pallas_call` of each grid."""

  def __init__(self, q: jax.Array, k: jax.Array, interpret: bool) -> None:
    self.batch, queries, self.heads, head_dim = q.shape
    keys, self.kv_heads = k.shape[1:3]
    self.interpret, self.query_blocks, self.key_blocks = interpret, queries // BLOCK, keys // BLOCK
    self.warps = 4 if head_dim <= 64 else 8
    self.statistic = jax.ShapeDtypeStruct((self.batch, self.heads, queries), jnp.float32)
    group = self.heads // self.kv_heads
    # Programs of `over_queries`: one block of queries of one head and row.
    self.query = pl.BlockSpec((None, BLOCK, None, head_dim), lambda i, n, b: (b, i, n, 0))
    self.keys = pl.BlockSpec((None, keys, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    self.bound = pl.BlockSpec((None, BLOCK), lambda i, n, b: (b, i))
    self.per_query = pl.BlockSpec((None, None, BLOCK), lambda i, n, b: (b, n, i))
    # Programs of `over_keys`: one block of keys of one KV head and row, with all queries of its group of heads.
    self.key = pl.BlockSpec((None, BLOCK, None, head_dim), lambda i, n, b: (b, i, n, 0))
    self.queries = pl.BlockSpec((None, queries, group, head_dim), lambda i, n, b: (b, 0, n, 0))
    self.all_bounds = pl.BlockSpec((None, queries), lambda i, n, b: (b, 0))
    self.at_key = pl.BlockSpec((None, None), lambda i, n, b: (b, i))
    self.statistics = pl.BlockSpec((None, group, queries), lambda i, n, b: (b, n, 0))

  def over_queries(self, kernel: Any, inputs: list[Any], outputs: list[tuple[Any, Any]], name: str) -> Any:
    return self._call(kernel, (self.query_blocks, self.heads, self.batch), inputs, outputs, name)

  def over_keys(self, kernel: Any, inputs: list[Any], outputs: list[tuple[Any, Any]], name: str) -> Any:
    return self._call(kernel, (self.key_blocks, self.kv_heads, self.batch), inputs, outputs, name)

  def _call(
    self, kernel: Any, grid: tuple[int, ...], inputs: list[Any], outputs: list[tuple[Any, Any]], name: str
  ) -> Any:
    return pl.pallas_call(
      lambda *refs: kernel(*refs[: len(inputs)], refs[len(inputs) :]),
      grid=grid,
      in_specs=inputs,
      out_specs=[spec for spec, _ in outputs],
      out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in outputs],
      compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=2),
      interpret=self.interpret,
      name=name,
    )


def _scores(
  q: jax.Array, k: jax.Array, first: jax.Array, last: jax.Array, start: jax.Array, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
  """Unmasked scores of a block of queries and the block of keys that begins at ``start``, and their mask."""
  slots = start + jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], k.shape[0]), 1)
  seen = (slots >= first[:, None]) & (slots <= last[:, None])
  return spec.scores(plgpu.dot(q, k.T), q.shape[1]), seen


class _BackwardInputs(NamedTuple):
  """The additional inputs of a backward pass.

  Attributes:
    d_out: the output's gradient.
    sums: each query's log-sum-exp, in base 2.
    shared: ``D = rowsum(dO ∘ O)``.
  """

  d_out: Tree
  sums: Tree
  shared: Tree


_Refs = tuple[jax.Ref, ...]


def _forward_kernel(q_ref: jax.Ref, keys: _Refs, bounds: _Refs, made: _Refs, *, spec: AttentionSpec) -> None:
  (k_ref, v_ref), (out_ref, sums_ref) = keys, made
  q, first, last = q_ref[...], *(ref[...] for ref in bounds)

  def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    accumulated, maximum, total = carry
    here = pl.ds(index * BLOCK, BLOCK)
    scores, seen = _scores(q, k_ref[here, :], first, last, index * BLOCK, spec)
    scores = jnp.where(seen, scores * _LOG2_E, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    weights = jnp.exp2(scores - new_maximum[:, None])
    shrink = jnp.exp2(maximum - new_maximum)
    v = v_ref[here, :]
    accumulated = accumulated * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
    return accumulated, new_maximum, total * shrink + weights.sum(axis=1)

  rows = jnp.zeros(q.shape[0], jnp.float32)
  start = jnp.zeros(q.shape, jnp.float32), rows + MASKED, rows
  accumulated, maximum, total = jax.lax.fori_loop(*_key_blocks(first, last), block, start)
  out_ref[...] = (accumulated / total[:, None]).astype(out_ref.dtype)
  sums_ref[...] = maximum + jnp.log2(total)


def _key_blocks(first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The range (first, end) of key blocks that the queries of a block see."""
  return jax.lax.div(first.min(), BLOCK), jax.lax.div(last.max(), BLOCK) + 1


def _d_scores(
  weights: jax.Array, d_weights: jax.Array, shared: jax.Array, scores: jax.Array, head_dim: int, spec: AttentionSpec
) -> jax.Array:
  """The gradient of ``q kᵀ`` from that of the weights."""
  d_scores = weights * (d_weights - shared[:, None])
  if spec.softcap is not None:
    d_scores = d_scores * (1 - jnp.square(scores / spec.softcap))
  return d_scores * spec.scale_for(head_dim)


def _d_q_kernel(
  q_ref: jax.Ref, keys: _Refs, bounds: _Refs, after: _BackwardInputs, made: _Refs, *, spec: AttentionSpec
) -> None:
  (k_ref, v_ref), [d_q_ref] = keys, made
  q, first, last = q_ref[...], *(ref[...] for ref in bounds)
  d_out, sums, shared = (ref[...] for ref in after)

  def block(index: jax.Array, d_q: jax.Array) -> jax.Array:
    here = pl.ds(index * BLOCK, BLOCK)
    k = k_ref[here, :]
    scores, seen = _scores(q, k, first, last, index * BLOCK, spec)
    weights = jnp.where(seen, jnp.exp2(scores * _LOG2_E - sums[:, None]), 0.0)
    d_scores = _d_scores(weights, plgpu.dot(d_out, v_ref[here, :].T), shared, scores, q.shape[1], spec)
    return d_q + plgpu.dot(d_scores.astype(k.dtype), k)

  d_q = jax.lax.fori_loop(*_key_blocks(first, last), block, jnp.zeros(q.shape, jnp.float32))
  d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _d_kv_kernel(
  q_ref: jax.Ref, keys: _Refs, bounds: _Refs, after: _BackwardInputs, made: _Refs, *, spec: AttentionSpec
) -> None:
  (first_ref, last_ref, begin_ref, end_ref), (d_k_ref, d_v_ref) = bounds, made
  k, v, start = *(ref[...] for ref in keys), pl.program_id(0) * BLOCK

  def block(head: int, index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    d_k, d_v = carry
    here = pl.ds(index * BLOCK, BLOCK)
    q, d_out = q_ref[here, head, :], after.d_out[here, head, :]
    scores, seen = _scores(q, k, first_ref[here], last_ref[here], start, spec)
    weights = jnp.where(seen, jnp.exp2(scores * _LOG2_E - after.sums[head, here][:, None]), 0.0)
    d_v = d_v + plgpu.dot(weights.astype(d_out.dtype).T, d_out)
    d_scores = _d_scores(weights, plgpu.dot(d_out, v.T), after.shared[head, here], scores, q.shape[1], spec)
    return d_k + plgpu.dot(d_scores.astype(q.dtype).T, q), d_v

  zeros = jnp.zeros(k.shape, jnp.float32)
  d_k, d_v = zeros, zeros
  for head in range(q_ref.shape[1]):
    d_k, d_v = jax.lax.fori_loop(begin_ref[...], end_ref[...], functools.partial(block, head), (d_k, d_v))
  d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)
