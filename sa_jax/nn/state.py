"""The attention state: what an anchor layer hands its followers."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig


@struct.dataclass
class QueryKey:
  """The anchor's rotary-encoded queries and keys: O(T) memory, and any fused attention can use them.

  Attributes:
    q: ``[B, T, N, H]``.
    k: ``[B, T, K, H]``.
    lengths: int32 ``[B]``, or None when rows are full.
    backend: how to attend; see `sa_jax.ops.attend`.
  """

  q: jax.Array
  k: jax.Array
  lengths: jax.Array | None = None
  backend: str = struct.field(pytree_node=False, default="auto")

  def attend(self, v: jax.Array) -> jax.Array:
    """The anchor's attention over a layer's values: ``[B, T, K, H]`` → ``[B, T, N, H]``."""
    backend = ops.choose_backend(self.backend, self.q, self.k)
    attend = lambda q, k, v, lengths: ops.attend(q, k, v, lengths=lengths, backend=backend)
    if not ops.backends[backend].partitions:
      attend = _per_shard(attend)
    return attend(self.q, self.k, v, self.lengths)

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

  def weights(self) -> jax.Array:
    """The softmaxed attention weights ``[B, N, T, S]``."""
    return self.probs


def _per_shard(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Attention of each device's rows and heads by itself, on the ambient mesh under the ambient logical axis rules.

  Rows and heads do not see each other, so this adds no communication. Without a mesh, or inside a `jax.shard_map` of
  the caller's, ``attend`` is left alone.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return attend
  if not nn.get_logical_axis_rules():
    raise ValueError(
      "this attention backend runs on a mesh only where the rules say how: use `with sa_jax.sharding.on_mesh(mesh):`"
    )
  q, k = (nn.logical_to_mesh_axes(("batch", "length", heads, "head_dim")) for heads in ("heads", "kv_heads"))
  rows = nn.logical_to_mesh_axes(("batch",))
  return jax.shard_map(attend, in_specs=(q, k, k, rows), out_specs=q, check_vma=False)


State = QueryKey | AttentionWeights


def make_state(config: ModelConfig, q: jax.Array, k: jax.Array, lengths: jax.Array | None) -> State:
  """The state in the form that the config asks for, from rotary-encoded q ``[B, T, N, H]`` and k ``[B, T, K, H]``."""
  if config.attention_state == "query_key":
    return QueryKey(q, k, lengths, config.attention)
  return AttentionWeights(ops.attention_weights(q, k, lengths=lengths))
