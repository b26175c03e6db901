"""One backward pass for all followers of an anchor.

Attention is linear in its weights, and all layers of a group share them. The followers' contribution to the gradient
of the scores is therefore one product over the concatenated heads of all followers,

    dS = P ∘ (Σ_l dO_l V_lᵀ - Σ_l D_l),    D_l = rowsum(dO_l ∘ O_l),

from which the gradients of queries and keys are computed once. A follower's own backward pass is ``dV_l = Pᵀ dO_l``,
two of the five matrix products of a full backward pass. (Softmax gradient: Dao et al., arXiv 2205.14135, appendix B.2.)

Each follower takes a `Tap`: zeros that its forward pass ignores. Its backward pass returns ``dO_l`` and ``V_l`` as the
tap's cotangents, which is how they reach the anchor. They are not gradients, so use each tap in one call of `follow`
only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec


class Gathered(NamedTuple):
  """What the followers of a group pass to their anchor's backward pass (zeros in the forward pass).

  Attributes:
    d_out: ``[L, B, T, N, R]``, output gradients of the L followers.
    v: ``[L, B, S, K, R]``, their values.
    inner: float32 ``[B, N, T]``, the sum of their ``D_l``.
    log_sums: float32 ``[B, N, T]``, each query's log-sum-exp.
  """

  d_out: jax.Array
  v: jax.Array
  inner: jax.Array
  log_sums: jax.Array


Tap = Gathered
"""The same fields for one follower, without the axis L; stacked for all followers, every field has a first axis L."""


class Parts(NamedTuple):
  """The building blocks of a group's shared backward pass; shapes as in `sa_jax.ops.attend`.

  Attributes:
    forward: (q, k, v, rows, spec) → the output, and each query's log-sum-exp, float32 ``[B, N, T]``.
    d_values: (q, k, log_sums, d_out ``[B, T, N, R]``, rows, spec) → the gradient of v.
    d_query_key: (q, k, `Gathered`, rows, spec) → the gradients of q and k.
    takes: (q, rows, spec) → whether the call is supported.
    least: minimum number of followers for which this is faster than separate backward passes.
    partitions: as in `Backend`.
    narrow: as in `Backend`.
  """

  forward: Callable[[jax.Array, jax.Array, jax.Array, Rows, AttentionSpec], tuple[jax.Array, jax.Array]]
  d_values: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Rows, AttentionSpec], jax.Array]
  d_query_key: Callable[[jax.Array, jax.Array, Gathered, Rows, AttentionSpec], tuple[jax.Array, jax.Array]]
  takes: Callable[[jax.Array, Rows, AttentionSpec], bool]
  least: int = 2
  partitions: bool = True
  narrow: bool = True


class Followers(NamedTuple):
  """Static properties of a group's followers.

  Attributes:
    parts: the implementation of their attention.
    spec: window, soft cap and scale.
    layers: ``L``, number of followers.
    width: ``R``, size of a value head.
  """

  parts: Parts
  spec: AttentionSpec
  layers: int
  width: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def taps(q: jax.Array, k: jax.Array, rows: Rows, how: Followers) -> Tap:
  """The taps of all followers that use these queries and keys, stacked along a first axis L."""
  return _zeros(q, k, rows, how)


def _zeros(q: jax.Array, k: jax.Array, rows: Rows, how: Followers) -> Tap:
  # Computed from all common arguments, so that under `jax.vmap` the zeros are batched if any of them is.
  none = lambda x: jax.lax.select(jnp.zeros((), bool), x[(0,) * x.ndim].astype(jnp.float32), jnp.float32(0))
  nothing = sum(map(none, jax.tree.leaves((q, k, rows))), jnp.float32(0))

  def zeros(x: jax.Array) -> jax.Array:
    x = jax.lax.select(jnp.zeros(x.shape, bool), x, jnp.zeros_like(x))
    return jnp.broadcast_to(x + nothing.astype(x.dtype), (how.layers, *x.shape))

  per_query = jnp.swapaxes(q[..., 0], 1, 2).astype(jnp.float32)
  return Tap(zeros(q[..., : how.width]), zeros(k[..., : how.width]), zeros(per_query), zeros(per_query))


def _taps_forward(
  q: jax.Array, k: jax.Array, rows: Rows, how: Followers
) -> tuple[Tap, tuple[jax.Array, jax.Array, Rows]]:
  return _zeros(q, k, rows, how), (q, k, rows)


def _taps_backward(
  how: Followers, residuals: tuple[jax.Array, jax.Array, Rows], handed: Tap
) -> tuple[jax.Array | None, ...]:
  q, k, rows = residuals
  gathered = Gathered(handed.d_out, handed.v, handed.inner.sum(0), handed.log_sums[0])
  return *how.parts.d_query_key(q, k, gathered, rows, how.spec), None


taps.defvjp(_taps_forward, _taps_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def follow(q: jax.Array, k: jax.Array, v: jax.Array, tap: Tap, rows: Rows, how: Followers) -> jax.Array:  # noqa: ARG001
  """A follower's attention: `sa_jax.ops.attend` that passes its share of the gradients of q and k through the tap."""
  return how.parts.forward(q, k, v, rows, how.spec)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, Rows, jax.Array, jax.Array]
"""Of `follow`: q, k, v, rows, the output, and each query's log-sum-exp."""


def _follow_forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  tap: Tap,  # noqa: ARG001
  rows: Rows,
  how: Followers,
) -> tuple[jax.Array, _Residuals]:
  out, log_sums = (checkpoint_name(x, KEPT) for x in how.parts.forward(q, k, v, rows, how.spec))
  return out, (q, k, v, rows, out, log_sums)


def _follow_backward(
  how: Followers, residuals: _Residuals, d_out: jax.Array
) -> tuple[None, None, jax.Array, Tap, None]:
  q, k, v, rows, out, log_sums = residuals
  d_v = how.parts.d_values(q, k, log_sums, d_out, rows, how.spec)
  inner = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
  return None, None, d_v.astype(v.dtype), Tap(d_out, v, inner, log_sums), None


follow.defvjp(_follow_forward, _follow_backward)
