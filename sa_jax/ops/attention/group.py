"""One backward pass for all followers of an anchor.

Attention is linear in its weights, and the layers of a group have the same ones. What reaches the scores from its
followers is therefore one product over their heads side by side,

    dS = P ∘ (Σ_l dO_l V_lᵀ - Σ_l D_l),    D_l = rowsum(dO_l ∘ O_l),

and the gradients of queries and keys are computed of it once. A follower's own backward pass is ``dV_l = Pᵀ dO_l``, two
products of the five that attention has. (The softmax's gradient: Dao et al., arXiv 2205.14135, appendix B.2.)

A follower's ``dO_l`` and ``V_l`` reach its anchor by a `Tap`: zeros that it is given and does not read, and whose
cotangents they are said to be. They are no gradients, so that a tap serves one call of `follow` and nothing else.
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
  """What the followers of a group hand to their anchor's backward pass, or zeros in its place.

  Attributes:
    d_out: ``[L, B, T, N, R]``, the gradients of the L followers' outputs.
    v: ``[L, B, S, K, R]``, their values.
    inner: float32 ``[B, N, T]``, the sum of their D.
    log_sums: float32 ``[B, N, T]``, each query's log of the sum of exponentials; of a `Tap`, for each follower.
  """

  d_out: jax.Array
  v: jax.Array
  inner: jax.Array
  log_sums: jax.Array


Tap = Gathered
"""One follower's part of it, without the first axis; of all of them, with a first axis of L everywhere."""


class Parts(NamedTuple):
  """Attention in the parts that a group's backward pass is made of; shapes as in `sa_jax.ops.attend`.

  Attributes:
    forward: of q, k, v, rows, spec: the output, and each query's log of sums, float32 ``[B, N, T]``.
    d_values: of q, k, the log of sums, the output's gradient ``[B, T, N, R]``, rows, spec: that of v.
    d_query_key: of q, k, what is `Gathered`, rows, spec: those of q and k.
    takes: from q, rows and spec, whether they can compute the call.
    least: for how many followers they are worth while.
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
  """What is known of a group's followers before the arrays are.

  Attributes:
    parts: what computes their attention.
    spec: window, soft cap and scale.
    layers: how many there are.
    width: ``R``, how many numbers a head's values have.
  """

  parts: Parts
  spec: AttentionSpec
  layers: int
  width: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def taps(q: jax.Array, k: jax.Array, rows: Rows, how: Followers) -> Tap:
  """What the followers of these queries and keys are given, each its own: the first axis is theirs."""
  return _zeros(q, k, rows, how)


def _zeros(q: jax.Array, k: jax.Array, rows: Rows, how: Followers) -> Tap:
  # Made of all that followers have in common, so that under `jax.vmap` there are as many as of any of it.
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
  """A follower's attention: `sa_jax.ops.attend`, whose gradients of q and k take the way through the tap."""
  return how.parts.forward(q, k, v, rows, how.spec)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, Rows, jax.Array, jax.Array]
"""Of `follow`: q, k, v, rows, the output, and each query's log of sums."""


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
