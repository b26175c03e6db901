"""Attention layers. A follower is a type without queries and keys, not a flag.

All are made of the same named pieces: values from x, the state's attention over them, output. An anchor also makes
the state. ``extend`` is the same layer for new tokens against a cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.cache import LayerCache
from sa_jax.nn.norm import RMSNorm
from sa_jax.nn.split import on_each_device, split_for_attention
from sa_jax.nn.state import AttentionWeights, Local, QueryKey, State, make_state

# The logical axes of new tokens' queries, their keys or values, their weights, and of the cache that they join.
_QUERIES, _KEYS = (("batch", None, heads, "head_dim") for heads in ("heads", "kv_heads"))
_WEIGHTS, _CACHED = ("batch", "heads", None, None), ("batch", "kv_heads", None, "head_dim")


class _KernelAxes(nn.LogicallyPartitioned):
  """The logical axes of a kernel.

  `nn.DenseGeneral` makes its kernel flat and unboxes it before giving it its shape: on a mesh, the constraint that
  unboxing applies would be of another rank than the array.
  """

  def unbox(self, apply_constraint: bool = True) -> Any:
    return super().unbox(apply_constraint and self.value.ndim == len(self.names))


class _Projection(nn.DenseGeneral):
  """A linear map, plus ``x A B`` where its parameters have adapters ``A [..., r]``, ``B [r, ...]`` (`sa_jax.train`)."""

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    y = super().__call__(inputs)
    if not self.has_variable("params", "lora_a"):
      return y
    a, b = (jnp.asarray(self.get_variable("params", name)).astype(y.dtype) for name in ("lora_a", "lora_b"))
    axes = 1 if isinstance(self.axis, int) else len(self.axis)
    return y + jnp.tensordot(jnp.tensordot(inputs, a, axes=axes), b, axes=1)


def projection(
  config: ModelConfig,
  features: int | tuple[int, ...],
  inputs: tuple[str, ...],
  outputs: tuple[str, ...],
  name: str,
  bias: bool = False,
) -> _Projection:
  """A linear map whose kernel carries its logical axes, ``inputs`` then ``outputs``, and its bias ``outputs``."""
  # DenseGeneral initialises the kernel as a matrix, all inputs by all outputs.
  init = nn.initializers.lecun_normal()
  return _Projection(
    features,
    axis=tuple(range(-len(inputs), 0)),
    use_bias=bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=lambda *args: _KernelAxes(init(*args), inputs + outputs),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, outputs),
    name=name,
  )


def _rotation(
  config: ModelConfig, lengths: jax.Array | int, local: Local
) -> tuple[np.ndarray | jax.Array, float | jax.Array]:
  """The rotary embedding's frequencies and magnitude in a layer that is local or not."""

  def of(rope: ops.RopeConfig) -> tuple[np.ndarray | jax.Array, float]:
    return ops.rope_frequencies(rope, config.head_dim, lengths), rope.magnitude

  if config.local_rope is None or local is False:
    return of(config.rope)
  if local is True:
    return of(config.local_rope)
  return jax.tree.map(lambda here, there: jnp.where(local, here, there), of(config.local_rope), of(config.rope))


class _Attention(nn.Module):
  """What anchors and followers have in common: values and output.

  Attributes:
    config: the model's shapes and how to compute.
  """

  config: ModelConfig

  def setup(self) -> None:
    config = self.config
    self.v_proj = projection(
      config,
      (config.num_kv_heads, config.head_dim),
      ("embed",),
      ("kv_heads", "head_dim"),
      name="v_proj",
      bias=config.qkv_bias,
    )
    self.o_proj = projection(
      config, config.embed_dim, ("heads", "head_dim"), ("embed",), name="o_proj", bias=config.output_bias
    )

  def values(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → ``[B, T, K, H]``."""
    return self._for_attention(self.v_proj(x), "kv_heads")

  def _for_attention(self, x: jax.Array, heads: str) -> jax.Array:
    """Queries, keys or values ``[B, T, heads, H]`` where attention needs them."""
    # First where their tokens are: otherwise XLA gathers what the projection reads, and projects whole rows everywhere.
    x = nn.with_logical_constraint(x, ("batch", "length", heads, "head_dim"))
    return split_for_attention(x, heads, self.config.num_kv_heads)

  def output(self, heads: jax.Array) -> jax.Array:
    """``[B, T, N, H]`` → ``[B, T, D]``."""
    heads = nn.with_logical_constraint(heads, ("batch", "length", "heads", "head_dim"))
    return nn.with_logical_constraint(self.o_proj(heads), ("batch", "length", "embed"))


class AnchorAttention(_Attention):
  """Self-attention that hands out its attention state (Liao & Vargas, arXiv 2407.12866)."""

  def setup(self) -> None:
    super().setup()
    config = self.config
    bias = config.qkv_bias
    self.q_proj = projection(
      config, (config.num_heads, config.head_dim), ("embed",), ("heads", "head_dim"), name="q_proj", bias=bias
    )
    self.k_proj = projection(
      config, (config.num_kv_heads, config.head_dim), ("embed",), ("kv_heads", "head_dim"), name="k_proj", bias=bias
    )
    if config.qk_norm:
      self.q_norm = RMSNorm(config, axis="head_dim")
      self.k_norm = RMSNorm(config, axis="head_dim")

  def query_key(
    self, x: jax.Array, positions: jax.Array, lengths: jax.Array | int, local: Local
  ) -> tuple[jax.Array, jax.Array]:
    """Rotary-encoded queries ``[B, T, N, H]`` and keys ``[B, T, K, H]`` of ``[B, T, D]`` in rows of these lengths."""
    return self.encoded(self.q_proj(x), self.k_proj(x), positions, lengths, local)

  def encoded(
    self, q: jax.Array, k: jax.Array, positions: jax.Array, lengths: jax.Array | int, local: Local
  ) -> tuple[jax.Array, jax.Array]:
    """`query_key` from what the projections give."""
    if self.config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    rotation = _rotation(self.config, lengths, local)
    q, k = ops.apply_rope(q, positions, *rotation), ops.apply_rope(k, positions, *rotation)
    return self._for_attention(q, "heads"), self._for_attention(k, "kv_heads")

  def __call__(
    self,
    x: jax.Array,
    lengths: jax.Array | None = None,
    local: Local = False,
    segments: jax.Array | None = None,
  ) -> tuple[jax.Array, State]:
    """Attention over whole sequences.

    Args:
      x: ``[B, T, D]``.
      lengths: int32 ``[B]`` of right-padded rows, or None when rows are full.
      local: whether this is one of the config's ``local_layers``.
      segments: int32 ``[B, T]``, the documents of packed rows, or None when a row is one document.

    Returns:
      ``y [B, T, D]`` and the state for the followers.
    """
    y, state, _ = self.prefill(x, lengths, local, segments)
    return y, state

  def prefill(
    self,
    x: jax.Array,
    lengths: jax.Array | None = None,
    local: Local = False,
    segments: jax.Array | None = None,
  ) -> tuple[jax.Array, State, LayerCache]:
    """`__call__` that also returns the cache of the T tokens, ``[B, K, T, H]`` each for keys and values."""
    # A document's positions need not begin at 0: the rotary embedding only tells how far apart two tokens are.
    length = x.shape[1]
    q, k = self.query_key(x, jnp.arange(length), length if lengths is None else lengths, local)
    v = self.values(x)
    state = make_state(self.config, q, k, lengths, local, segments)
    return self.output(state.attend(v)), state, LayerCache.of(self.config, v, k)

  def new_token(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the projections give of one token a row, ``[B, 1, D]``: reading their weights is the cost."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    plain = all(set(each.variables["params"]) == {"kernel"} for each in projections)  # no bias, no adapters

    def kernel(x: jax.Array, *weights: jax.Array) -> list[jax.Array] | None:
      flat = [weight.reshape(weight.shape[0], -1) for weight in weights]
      if not ops.has_linear_kernels(x, *flat):
        return None
      products = ops.linears(x, flat)
      return [y.reshape(-1, *weight.shape[1:]) for y, weight in zip(products, weights, strict=True)]

    weights = ((None, "heads", "head_dim"), *[(None, "kv_heads", "head_dim")] * 2)
    call = on_each_device(kernel, (("batch", None), *weights), ("batch", "heads", "head_dim"))
    made = call(x[:, 0], *(each.variables["params"]["kernel"] for each in projections)) if plain else None
    return (self.q_proj(x), self.k_proj(x), self.values(x)) if made is None else tuple(y[:, None] for y in made)

  def extend(
    self,
    x: jax.Array,
    cache: LayerCache,
    positions: jax.Array,
    lengths: jax.Array,
    local: bool = False,
    followed: bool = True,
  ) -> tuple[jax.Array, AttentionWeights | None, LayerCache]:
    """Attention of new tokens over the cache that they join.

    Args:
      x: ``[B, T, D]``.
      cache: this layer's; the tokens are written to their slots.
      positions: int32 ``[B, T]``, the slot of each token, which is also its position.
      lengths: int32 ``[B]``, tokens of each row, the new ones included.
      local: whether this is one of the config's ``local_layers``.
      followed: whether followers need the weights; without, a fused kernel may keep them.

    Returns:
      ``y [B, T, D]``; the weights for the followers, or None; and the cache.
    """
    assert cache.keys is not None, "an anchor's cache has keys"
    q, k, v = self.new_token(x) if x.shape[1] == 1 else (self.q_proj(x), self.k_proj(x), self.values(x))
    q, k = self.encoded(q, k, positions, lengths, local)
    attend = on_each_device(
      functools.partial(ops.decode_attend, spec=self.config.spec(local), with_weights=followed),
      (_QUERIES, _KEYS, _KEYS, _CACHED, _CACHED, ("batch", None)),
      (_QUERIES, _WEIGHTS, _CACHED, _CACHED),
    )
    heads, weights, keys, values = attend(q, k, v, cache.keys, cache.values, positions)
    state = None if weights is None else AttentionWeights(weights)
    return self.output(heads), state, LayerCache(values, keys)


class FollowerAttention(_Attention):
  """Attention with an anchor's weights: no W_Q, no W_K, no rotary embedding, no keys in its cache."""

  def __call__(self, x: jax.Array, state: State) -> jax.Array:
    """Attention over whole sequences.

    Args:
      x: ``[B, T, D]``.
      state: the anchor's.

    Returns:
      ``[B, T, D]``.
    """
    return self.prefill(x, state)[0]

  def prefill(self, x: jax.Array, state: State) -> tuple[jax.Array, LayerCache]:
    """`__call__` that also returns the cache of the T tokens: values ``[B, K, T, H]`` alone."""
    v = self.values(x)
    return self.output(state.attend(v)), LayerCache.of(self.config, v)

  def extend(
    self, x: jax.Array, state: AttentionWeights, cache: LayerCache, positions: jax.Array
  ) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens with the anchor's weights; shapes as in `AnchorAttention.extend`."""
    follow = on_each_device(ops.decode_follow, (_WEIGHTS, _KEYS, _CACHED, ("batch", None)), (_QUERIES, _CACHED))
    heads, values = follow(state.probs, self.values(x), cache.values, positions)
    return self.output(heads), LayerCache(values)


class MixedAttention(AnchorAttention):
  """A follower that has kept its own queries and keys: its weights are in part its anchor's and in part its own."""

  def mix(
    self, x: jax.Array, state: QueryKey, share: jax.Array | float, lengths: jax.Array | None, local: Local
  ) -> jax.Array:
    """Attention with the weights ``share * anchor's + (1 - share) * own``.

    Attention is linear in its weights, so that this is two fused attentions, and none has its weights in memory.

    Args:
      x: ``[B, T, D]``.
      state: the anchor's.
      share: 0 to 1.
      lengths: as the anchor's.
      local: as the anchor's.

    Returns:
      ``[B, T, D]``.
    """
    length = x.shape[1]
    q, k = self.query_key(x, jnp.arange(length), length if lengths is None else lengths, local)
    v = self.values(x)
    own = dataclasses.replace(state, q=q, k=k).attend(v)
    if isinstance(share, float) and share == 0:
      return self.output(own)
    return self.output(
      (share * state.attend(v).astype(jnp.float32) + (1 - share) * own.astype(jnp.float32)).astype(own.dtype)
    )
