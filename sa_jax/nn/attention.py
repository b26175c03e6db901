"""Attention layers. A follower is a separate type without queries and keys, not a flag.

All consist of the same methods: values from x, attention over them with the state, output. An anchor also computes
the state. ``extend`` applies the same layer to new tokens with a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.nn.axes import LECUN, of_vector, with_axes
from sa_jax.nn.cache import LayerCache
from sa_jax.nn.norm import Norm
from sa_jax.nn.split import Heads, constrain, on_each_device, split_for_attention
from sa_jax.nn.state import AttentionWeights, Kind, QueryKey, State, make_state

# Logical axes of new tokens' queries, their keys or values, their attention weights, and the cache.
_QUERIES, _KEYS = (("batch", None, heads, "head_dim") for heads in ("heads", "kv_heads"))
_WEIGHTS, _CACHED = ("batch", "heads", None, None), ("batch", "kv_heads", None, "head_dim")


class _Projection(nn.DenseGeneral):
  """A linear map, plus ``x A B`` if its parameters include adapters ``A [..., r]``, ``B [r, ...]`` (`sa_jax.train`)."""

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
  """A linear map whose kernel has the logical axes ``inputs`` then ``outputs``; its bias has those of a vector."""
  return _Projection(
    features,
    axis=tuple(range(-len(inputs), 0)),
    use_bias=bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    # DenseGeneral initialises it as a flat matrix, inputs × outputs.
    kernel_init=with_axes(LECUN, inputs + outputs),
    bias_init=with_axes(nn.initializers.zeros, of_vector(outputs)),
    name=name,
  )


def _rotation(
  config: ModelConfig, kind: Kind, lengths: jax.Array | int
) -> tuple[np.ndarray | jax.Array, float | jax.Array] | None:
  """RoPE frequencies and magnitude for a layer of this kind; None for NoPE."""

  def of(rope: ops.RopeConfig | None) -> tuple[np.ndarray | jax.Array, float] | None:
    return None if rope is None else (ops.rope_frequencies(rope, config.head_dim, lengths), rope.magnitude)

  ropes = [each.rope for each in config.kinds]
  if isinstance(kind, int) or len(set(ropes)) == 1:
    return of(ropes[kind if isinstance(kind, int) else 0])
  made = [of(rope) for rope in ropes]
  like = next(each for each in made if each is not None)
  # NoPE layers rotate by zero frequencies.
  still = (jnp.zeros_like(like[0]), 1.0)
  frequencies, magnitudes = zip(*(still if each is None else each for each in made), strict=True)
  return jnp.stack(jnp.broadcast_arrays(*frequencies))[kind], jnp.asarray(magnitudes)[kind]


class _Attention(nn.Module):
  """What anchors and followers share: values and output.

  Attributes:
    config: the model's shapes and how to compute it.
  """

  config: ModelConfig

  def setup(self) -> None:
    config = self.config
    self.v_proj = projection(
      config,
      (config.num_kv_heads, config.value_width),
      ("embed",),
      ("kv_heads", "head_dim"),
      name="v_proj",
      bias=config.qkv_bias,
    )
    self.o_proj = projection(
      config, config.embed_dim, ("heads", "head_dim"), ("embed",), name="o_proj", bias=config.output_bias
    )

  def check(self, x: jax.Array) -> None:
    """Checks the shape of whole sequences' hidden states.

    Raises:
      UserError: if it is not ``[B, T, D]``.
    """
    if x.ndim != 3 or x.shape[-1] != self.config.embed_dim:
      raise UserError(f"attention takes hidden states [B, T, {self.config.embed_dim}], not {list(x.shape)}")

  def values(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → ``[B, T, K, R]``."""
    return self._for_attention(self.v_proj(x), "kv_heads")

  def _for_attention(self, x: jax.Array, heads: str) -> jax.Array:
    """Queries, keys or values ``[B, T, heads, H]``, sharded for attention."""
    # Constrain to the tokens' sharding first: otherwise XLA gathers the projection's input and projects whole rows on
    # every device.
    x = constrain(x, ("batch", "length", heads, "head_dim"))
    return split_for_attention(x, heads, Heads(self.config.num_heads, self.config.num_kv_heads))

  def output(self, heads: jax.Array) -> jax.Array:
    """``[B, T, N, R]`` → ``[B, T, D]``."""
    heads = constrain(heads, ("batch", "length", "heads", "head_dim"))
    return constrain(self.o_proj(heads), ("batch", "length", "embed"))


class AnchorAttention(_Attention):
  """Self-attention that also returns its attention state (Liao & Vargas, arXiv 2407.12866)."""

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
      together = lambda heads: (heads, "head_dim") if config.qk_norm == "heads" else ("head_dim",)
      self.q_norm, self.k_norm = (Norm(config, together(heads)) for heads in ("heads", "kv_heads"))
    if config.sinks:
      init = with_axes(nn.initializers.zeros, ("heads",))
      self.sinks = self.param("sinks", init, (config.num_heads,), config.param_dtype)

  def query_key(self, x: jax.Array, rows: ops.Rows, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Queries ``[B, T, N, H]`` and keys ``[B, T, K, H]`` with RoPE applied, from ``[B, T, D]``."""
    return self.encoded(self.q_proj(x), self.k_proj(x), rows, kind)

  def encoded(self, q: jax.Array, k: jax.Array, rows: ops.Rows, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """`query_key` from the outputs of the projections."""
    if self.config.norm_rotated:
      q, k = self._normalised(*self._rotated(q, k, rows, kind))
    else:
      q, k = self._rotated(*self._normalised(q, k), rows, kind)
    if self.config.cache_format is not None and self.config.cache_format.rotates_keys:
      q, k = ops.hadamard(q), ops.hadamard(k)
    return self._for_attention(q, "heads"), self._for_attention(k, "kv_heads")

  def _normalised(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (self.q_norm(q), self.k_norm(k)) if self.config.qk_norm else (q, k)

  def _rotated(self, q: jax.Array, k: jax.Array, rows: ops.Rows, kind: Kind) -> tuple[jax.Array, jax.Array]:
    # A document's positions need not start at 0: RoPE depends only on the distance between two tokens.
    rotation = _rotation(self.config, kind, q.shape[1] if rows.lengths is None else rows.lengths)
    if rotation is None:
      return q, k
    positions = rows.positions(q.shape[1])
    # All layers with RoPE have the same plane layout and the same query growth.
    rope = next(kind.rope for kind in self.config.kinds if kind.rope is not None)
    q, k = (ops.apply_rope(x, positions, *rotation, rope.interleaved) for x in (q, k))
    return ops.grow_queries(q, positions, rope), k

  def __call__(self, x: jax.Array, rows: ops.Rows = ops.Rows(), kind: Kind = 0) -> tuple[jax.Array, State]:
    """Attention over whole sequences.

    Args:
      x: ``[B, T, D]``.
      rows: which tokens each token may attend to; by default full rows, causal.
      kind: which of the config's ``kinds`` this layer is.

    Returns:
      ``y [B, T, D]`` and the state for the followers.

    Raises:
      UserError: if ``x`` has another shape.
    """
    self.check(x)
    return self.prefill(x, rows, kind)[:2]

  def prefill(self, x: jax.Array, rows: ops.Rows, kind: Kind) -> tuple[jax.Array, State, LayerCache]:
    """`__call__` that also returns the cache of the T tokens: keys ``[B, K, T, H]``, values ``[B, K, T, R]``."""
    q, k = self.query_key(x, rows, kind)
    v = self.values(x)
    state = self.new_state(q, k, rows, kind)
    return self.output(state.attend(v)), state, LayerCache.of(self.config, v, k)

  def new_state(self, q: jax.Array, k: jax.Array, rows: ops.Rows, kind: Kind) -> State:
    """The state for this layer and its followers, from the output of `query_key`."""
    return make_state(self.config, q, k, self.with_sinks(rows), kind)

  def with_sinks(self, rows: ops.Rows) -> ops.Rows:
    """The rows with this layer's attention sinks, float32, if it has any."""
    return dataclasses.replace(rows, sinks=jnp.asarray(self.sinks, jnp.float32)) if self.config.sinks else rows

  def new_token(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs of the projections for one token per row, ``[B, 1, D]``; bound by reading the weights."""
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
    self, x: jax.Array, cache: LayerCache, rows: ops.Rows, kind: int = 0, followed: bool = True
  ) -> tuple[jax.Array, AttentionWeights | None, LayerCache]:
    """Attention of new tokens over the cache, which includes them.

    Args:
      x: ``[B, T, D]``.
      cache: this layer's; the new tokens are written to their slots.
      rows: the offset, int32 ``[B]``, is the slot of each row's first new token; lengths include the new tokens.
      kind: which of the config's ``kinds`` this layer is.
      followed: whether followers need the attention weights; if not, a fused kernel need not return them.

    Returns:
      ``y [B, T, D]``; the weights for the followers, or None; and the cache.
    """
    rows = self.with_sinks(rows)
    assert cache.keys is not None, "an anchor's cache has keys"
    assert rows.offset is not None, "new tokens have a slot in the cache"
    q, k, v = self.new_token(x) if x.shape[1] == 1 else (self.q_proj(x), self.k_proj(x), self.values(x))
    q, k = self.encoded(q, k, rows, kind)
    spec = self.config.kinds[kind].spec

    def attend(q: jax.Array, new: Any, cached: Any, offset: jax.Array, sinks: jax.Array | None) -> tuple[Any, ...]:
      # Slots past a row's end are masked like later ones.
      visible = dataclasses.replace(rows, lengths=None, offset=offset, sinks=sinks)
      return ops.decode_attend(q, new, cached, visible, spec, with_weights=followed)

    if rows.bias is None and rows.mask is None:
      inputs, outputs = (_QUERIES, _KEYS, _CACHED, ("batch",), ("heads",)), (_QUERIES, _WEIGHTS, _CACHED)
      attend = on_each_device(attend, inputs, outputs)
    heads, weights, (keys, values) = attend(q, (k, v), (cache.keys, cache.values), rows.offset, rows.sinks)
    state = None if weights is None else AttentionWeights(weights)
    return self.output(heads), state, LayerCache(values, keys)


class FollowerAttention(_Attention):
  """Attention with an anchor's weights: no W_Q, no W_K, no RoPE, no keys in its cache."""

  def __call__(self, x: jax.Array, state: State) -> jax.Array:
    """Attention over whole sequences.

    Args:
      x: ``[B, T, D]``.
      state: the anchor's.

    Returns:
      ``[B, T, D]``.

    Raises:
      UserError: if ``x`` has another shape, or ``state`` is not an attention state.
    """
    self.check(x)
    if not hasattr(state, "attend"):
      raise UserError(
        "a follower takes an attention state, the second value that AnchorAttention returns, "
        f"not {type(state).__name__}"
      )
    return self.prefill(x, state)[0]

  def prefill(self, x: jax.Array, state: State) -> tuple[jax.Array, LayerCache]:
    """`__call__` that also returns the cache of the T tokens: values ``[B, K, T, R]`` only."""
    v = self.values(x)
    return self.output(state.attend(v)), LayerCache.of(self.config, v)

  def extend(
    self, x: jax.Array, state: AttentionWeights, cache: LayerCache, rows: ops.Rows
  ) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens with the anchor's weights; shapes as in `AnchorAttention.extend`."""
    follow = on_each_device(ops.decode_follow, (_WEIGHTS, _KEYS, _CACHED, ("batch",), ()), (_QUERIES, _CACHED))
    heads, values = follow(state.probs, self.values(x), cache.values, rows.offset, rows.pages)
    return self.output(heads), LayerCache(values)


class MixedAttention(AnchorAttention):
  """A follower that still has its own queries and keys: it mixes its anchor's attention weights with its own."""

  def mix(self, x: jax.Array, state: QueryKey, share: jax.Array | float, kind: Kind) -> jax.Array:
    """Attention with the weights ``share * anchor's + (1 - share) * own``.

    Attention is linear in its weights, so this takes two fused attentions that never materialise their weights.

    Args:
      x: ``[B, T, D]``.
      state: the anchor's.
      share: 0 to 1.
      kind: which of the config's ``kinds`` this layer is: it sees what its anchor sees, but its RoPE may differ.

    Returns:
      ``[B, T, D]``.
    """
    q, k = self.query_key(x, state.rows, kind)
    v = self.values(x)
    own = dataclasses.replace(state, q=q, k=k, rows=self.with_sinks(state.rows)).attend(v)
    if isinstance(share, float) and share == 0:
      return self.output(own)
    return self.output(
      (share * state.attend(v).astype(jnp.float32) + (1 - share) * own.astype(jnp.float32)).astype(own.dtype)
    )
