"""The attention state: what an anchor layer hands its followers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig


@struct.dataclass
class QueryKey:
  """The anchor's rotary-encoded queries and keys: O(T) memory, and any fused attention can use them.

  Attributes:
    q: ``[B, T, N, H]``.
    k: ``[B, T, K, H]``, or ``[B, T, N, H]`` once heads have been taken.
    lengths: int32 ``[B]``, or None when rows are full.
    backend: how to attend; see `sa_jax.ops.attend`.
  """

  q: jax.Array
  k: jax.Array
  lengths: jax.Array | None = None
  backend: str = struct.field(pytree_node=False, default="auto")

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, T, K, H]`` → ``[B, T, N, H]``."""
    if self.k.shape[2] > v.shape[2]:
      v = jnp.repeat(v, self.k.shape[2] // v.shape[2], axis=2)
    return ops.attend(self.q, self.k, v, lengths=self.lengths, backend=self.backend)

  def take_heads(self, head_map: jax.Array) -> QueryKey:
    """The state in which head ``n`` is this one's head ``head_map[n]``; int32 ``[N]``."""
    group = self.q.shape[2] // self.k.shape[2]
    q, k = jnp.take(self.q, head_map, axis=2), jnp.take(self.k, head_map // group, axis=2)
    return QueryKey(q, k, self.lengths, self.backend)

  def weights(self) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, T]``, computed now."""
    return ops.attention_weights(self.q, self.k, lengths=self.lengths)


@struct.dataclass
class AttentionWeights:
  """The anchor's softmaxed attention weights: O(T S) memory, the paper's literal algorithm.

  Attributes:
    probs: ``[B, N, T, S]``, in the compute dtype.
  """

  probs: jax.Array

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, S, K, H]`` → ``[B, T, N, H]``."""
    return ops.apply_weights(self.probs, v)

  def take_heads(self, head_map: jax.Array) -> AttentionWeights:
    """The state in which head ``n`` is this one's head ``head_map[n]``; int32 ``[N]``."""
    return AttentionWeights(jnp.take(self.probs, head_map, axis=1))

  def weights(self) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, S]``."""
    return self.probs


State = QueryKey | AttentionWeights


def make_state(config: ModelConfig, q: jax.Array, k: jax.Array, lengths: jax.Array | None) -> State:
  """The state in the form that the config asks for, from rotary-encoded q ``[B, T, N, H]`` and k ``[B, T, K, H]``."""
  if config.attention_state == "query_key":
    return QueryKey(q, k, lengths, config.attention)
  return AttentionWeights(ops.attention_weights(q, k, lengths=lengths))
