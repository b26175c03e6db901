"""The attention state: what an anchor layer hands its followers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.nn.split import attention_axes, heads_stay_with_their_keys, query_axis, split_for_attention

STATE = "attention_state"
"""The name of a state's arrays for rematerialisation."""

Local = bool | jax.Array
"""Whether a layer attends locally: known, or a traced bool where layers of both kinds share one scan."""


@struct.dataclass
class QueryKey:
  """The anchor's rotary-encoded queries and keys: O(T) memory, and any fused attention can use them.

  Attributes:
    q: ``[B, T, N, H]``.
    k: ``[B, T, K, H]``, or ``[B, T, N, H]`` once heads have been taken.
    lengths: int32 ``[B]``, or None when rows are full.
    segments: int32 ``[B, T]``, the documents of packed rows, or None.
    local: a traced bool that chooses the second of two ``specs``, or None when there is one.
    backend: how to attend; see `sa_jax.ops.attend`.
    specs: window, soft cap and scale.
  """

  q: jax.Array
  k: jax.Array
  lengths: jax.Array | None = None
  segments: jax.Array | None = None
  local: jax.Array | None = None
  backend: str = struct.field(pytree_node=False, default="auto")
  specs: tuple[ops.AttentionSpec, ...] = struct.field(pytree_node=False, default=(ops.AttentionSpec(),))

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, T, K, H]`` → ``[B, T, N, H]``."""
    if self.k.shape[2] > v.shape[2]:
      v = jnp.repeat(v, self.k.shape[2] // v.shape[2], axis=2)
    attend = functools.partial(_attend, self.q, self.k, v, self.lengths, self.segments, self.backend)
    return _with_spec(attend, self.specs, self.local)

  def take_heads(self, head_map: jax.Array) -> QueryKey:
    """The state in which head ``n`` is this one's head ``head_map[n]``; int32 ``[N]``."""
    group = self.q.shape[2] // self.k.shape[2]
    q, k = jnp.take(self.q, head_map, axis=2), jnp.take(self.k, head_map // group, axis=2)
    return dataclasses.replace(self, q=q, k=k)

  def weights(self, positions: jax.Array | None = None) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, T]``, computed now; only of the queries at ``positions`` if given."""
    q = self.q if positions is None else jnp.take(self.q, positions, axis=1, mode="clip")
    weights = functools.partial(
      ops.attention_weights, q, self.k, lengths=self.lengths, segments=self.segments, positions=positions
    )
    return _with_spec(weights, self.specs, self.local)


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

  def weights(self, positions: jax.Array | None = None) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, S]``; only of the queries at ``positions`` if given."""
    return self.probs if positions is None else jnp.take(self.probs, positions, axis=2, mode="clip")


State = QueryKey | AttentionWeights


def make_state(
  config: ModelConfig,
  q: jax.Array,
  k: jax.Array,
  lengths: jax.Array | None,
  local: Local = False,
  segments: jax.Array | None = None,
) -> State:
  """The state in the form that the config asks for, from rotary-encoded q ``[B, T, N, H]`` and k ``[B, T, K, H]``."""
  name = functools.partial(checkpoint_name, name=STATE)
  if config.attention_state == "query_key":
    q, k = name(q), name(k)
  if isinstance(local, bool):
    state = QueryKey(q, k, lengths, segments, None, config.attention, (config.spec(local),))
  else:
    state = QueryKey(q, k, lengths, segments, local, config.attention, (config.spec(False), config.spec(True)))
  return state if config.attention_state == "query_key" else AttentionWeights(name(state.weights()))


def _with_spec(
  attention: Callable[..., jax.Array], specs: tuple[ops.AttentionSpec, ...], local: jax.Array | None
) -> jax.Array:
  """The attention with its spec; of two, the one that ``local`` chooses is computed, and the other is not."""
  if local is None:
    return attention(spec=specs[0])
  return jax.lax.cond(local, lambda: attention(spec=specs[1]), lambda: attention(spec=specs[0]))


def _attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lengths: jax.Array | None,
  segments: jax.Array | None,
  backend: str,
  spec: ops.AttentionSpec,
) -> jax.Array:
  """`sa_jax.ops.attend`, of each device's queries, rows and heads by itself where XLA cannot split it over the mesh.

  Rows, heads and queries do not see each other, and what each needs is where `split_for_attention` has brought it, so
  this adds no communication. Inside a `jax.shard_map` of the caller's there is nothing left to split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  splits = not mesh.empty and not mesh.manual_axes
  along = query_axis(mesh, k.shape[2]) if splits else None
  rows = ops.Rows(packed=segments is not None, split=along is not None)
  backend = ops.choose_backend(backend, q, k, spec=spec, rows=rows)
  attend = functools.partial(ops.attend, backend=backend, spec=spec)
  if not splits or (along is None and ops.backends[backend].partitions):
    return split_for_attention(attend(q, k, v, lengths=lengths, segments=segments), "heads", k.shape[2])
  if not nn.get_logical_axis_rules():
    raise UserError(
      f"the attention backend {backend!r} runs on a mesh only where the rules say how it is split: "
      "use `with sa_jax.sharding.on_mesh(mesh):`"
    )

  if not heads_stay_with_their_keys():
    raise UserError(
      f"the attention backend {backend!r} runs of each device's heads by itself, which then need their keys: "
      "let the rules split 'heads' and 'kv_heads' over the same axes of the mesh"
    )

  def of_a_device(q: jax.Array, *others: Any) -> jax.Array:
    k, v, lengths, segments = others
    offset = None if along is None else jax.lax.axis_index(along) * q.shape[1]
    return attend(q, k, v, lengths=lengths, segments=segments, offset=offset)

  axes = nn.logical_to_mesh_axes
  queries, keys = (attention_axes(mesh, heads, k.shape[2]) for heads in ("heads", "kv_heads"))
  specs = (queries, keys, keys, axes(("batch",)), axes(("batch", None)))
  split = jax.shard_map(of_a_device, in_specs=specs, out_specs=queries, check_vma=False)
  return split(q, k, v, lengths, segments)
