"""The attention state: what an anchor layer passes to its followers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.split import attend, parts_of_group

STATE = "attention_state"
"""The checkpoint name of a state's arrays, for rematerialisation."""

Kind = int | jax.Array
"""Which of a config's ``kinds`` a layer is: static, or int32 ``[]`` if layers of several kinds share one scan."""


@struct.dataclass
class QueryKey:
  """The anchor's queries and keys with RoPE applied: O(T) memory, usable by any fused attention.

  Attributes:
    q: ``[B, T, N, H]``.
    k: ``[B, T, K, H]``, or ``[B, T, N, H]`` after `take_heads`.
    rows: which keys the queries may see, and the anchor's sinks.
    kind: int32 ``[]``, index into ``specs``; None if there is only one.
    backend: how to attend; see `sa_jax.ops.attend`.
    specs: window, soft cap and scale.
  """

  q: jax.Array
  k: jax.Array
  rows: ops.Rows = ops.Rows()
  kind: jax.Array | None = None
  backend: str = struct.field(pytree_node=False, default="auto")
  specs: tuple[ops.AttentionSpec, ...] = struct.field(pytree_node=False, default=(ops.AttentionSpec(),))

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, S, K, R]`` → ``[B, T, N, R]``."""
    if self.k.shape[2] > v.shape[2]:
      v = jnp.repeat(v, self.k.shape[2] // v.shape[2], axis=2)
    if self.kind is None:
      return attend(self.q, self.k, v, self.rows, self.specs[0], self.backend)
    return self._of_kind(functools.partial(attend, self.q, self.k, v, self.rows, backend=self.backend))

  def take_heads(self, head_map: jax.Array) -> QueryKey:
    """The state whose head ``n`` is this state's head ``head_map[n]``; int32 ``[N]``."""
    group = self.q.shape[2] // self.k.shape[2]
    q, k = jnp.take(self.q, head_map, axis=2), jnp.take(self.k, head_map // group, axis=2)
    sinks = None if self.rows.sinks is None else jnp.take(self.rows.sinks, head_map)
    return dataclasses.replace(self, q=q, k=k, rows=dataclasses.replace(self.rows, sinks=sinks))

  def weights(self, positions: jax.Array | None = None) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, S]``, computed on demand; only at queries ``positions`` if given."""
    q = self.q if positions is None else jnp.take(self.q, positions, axis=1, mode="clip")
    weights = functools.partial(ops.attention_weights, q, self.k, self.rows, positions=positions)
    return weights(spec=self.specs[0]) if self.kind is None else self._of_kind(weights)

  def _of_kind(self, attention: Callable[..., jax.Array]) -> jax.Array:
    """The attention with the spec of this state's kind; the others are not computed."""
    return jax.lax.switch(self.kind, [functools.partial(attention, spec=spec) for spec in self.specs])


@struct.dataclass
class Tapped(QueryKey):
  """The state of one follower in a group with a shared backward pass; see `sa_jax.ops.attention.group`.

  Attributes:
    tap: this follower's tap.
    how: static facts about the followers.
  """

  tap: ops.Tap | None = None
  how: ops.Followers | None = struct.field(pytree_node=False, default=None)

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over the follower's values, once: ``[B, S, K, R]`` → ``[B, T, N, R]``."""
    assert self.tap is not None, "a tap serves one call"
    assert self.how is not None, "what followers have in common is known"
    return ops.follow(self.q, self.k, v, self.tap, self.rows, self.how)


@struct.dataclass
class AttentionWeights:
  """The anchor's softmaxed attention weights: O(T S) memory, the paper's literal algorithm.

  Attributes:
    probs: ``[B, N, T, S]``, in the compute dtype.
  """

  probs: jax.Array

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, S, K, R]`` → ``[B, T, N, R]``."""
    return ops.apply_weights(self.probs, v)

  def take_heads(self, head_map: jax.Array) -> AttentionWeights:
    """The state whose head ``n`` is this state's head ``head_map[n]``; int32 ``[N]``."""
    return AttentionWeights(jnp.take(self.probs, head_map, axis=1))

  def weights(self, positions: jax.Array | None = None) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, S]``; only for the queries at ``positions`` if given."""
    return self.probs if positions is None else jnp.take(self.probs, positions, axis=2, mode="clip")


State = QueryKey | AttentionWeights


def tapped(state: State, followers: int, config: ModelConfig) -> Tapped | None:
  """The states of a group's followers for one shared backward pass; None if that is unsupported: then each has its own.

  The tap's arrays have a leading follower axis; the other arrays are shared by all followers.
  """
  # A user-defined anchor may return a state that attends differently, or other heads.
  if type(state) is not QueryKey or state.kind is not None or state.k.shape[2] != config.num_kv_heads:
    return None
  width = config.value_width
  parts = parts_of_group(state.q, state.k, state.rows, state.specs[0], state.backend)
  if parts is None or followers < parts.least or (width < state.q.shape[3] and not parts.narrow):
    return None
  how = ops.Followers(parts, state.specs[0], followers, width)
  return Tapped(**vars(state), tap=ops.taps(state.q, state.k, state.rows, how), how=how)


def make_state(config: ModelConfig, q: jax.Array, k: jax.Array, rows: ops.Rows, kind: Kind) -> State:
  """The state in the config's form, from q ``[B, T, N, H]`` and k ``[B, S, K, H]`` with RoPE applied."""
  name = functools.partial(checkpoint_name, name=STATE)
  if config.attention_state == "query_key":
    q, k = name(q), name(k)
  if isinstance(kind, int):
    state = QueryKey(q, k, rows, None, config.attention, (config.kinds[kind].spec,))
  else:
    state = QueryKey(q, k, rows, kind, config.attention, tuple(each.spec for each in config.kinds))
  return state if config.attention_state == "query_key" else AttentionWeights(name(state.weights()))
