"""Transformer blocks: attention and MLP, each normalised before and added to what it read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.attention import AnchorAttention, FollowerAttention, projection
from sa_jax.nn.cache import LayerCache
from sa_jax.nn.state import AttentionWeights, State


class RMSNorm(nn.Module):
  """Root mean square normalisation with a learned scale; see `sa_jax.ops.rms_norm`."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    scale = self.param("scale", init, (x.shape[-1],), self.config.param_dtype)
    return ops.rms_norm(x, scale, self.config.norm_eps)


class Mlp(nn.Module):
  """``down(silu(gate(x)) * up(x))`` (SwiGLU; Shazeer, arXiv 2002.05202)."""

  config: ModelConfig

  def setup(self) -> None:
    config = self.config
    self.gate_proj = projection(config, config.mlp_dim, ("embed",), ("mlp",), name="gate_proj")
    self.up_proj = projection(config, config.mlp_dim, ("embed",), ("mlp",), name="up_proj")
    self.down_proj = projection(config, config.embed_dim, ("mlp",), ("embed",), name="down_proj")

  def __call__(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → the same."""
    return self.down_proj(self.hidden(x))

  def hidden(self, x: jax.Array) -> jax.Array:
    """What the last projection reads: ``[B, T, D]`` → ``[B, T, F]``."""
    return nn.with_logical_constraint(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x), ("batch", "length", "mlp"))

  def step(self, x: jax.Array) -> jax.Array:
    """`__call__` for one token a row, ``[B, 1, D]``, where reading the weights is the cost."""
    gate, up = (module.variables["params"]["kernel"] for module in (self.gate_proj, self.up_proj))
    if not ops.has_gated_linear(x[:, 0], gate):
      return self(x)
    return self.down_proj(ops.gated_linear(x[:, 0], gate, up)[:, None])


class Block(nn.Module):
  """A block around some attention."""

  config: ModelConfig

  def setup(self) -> None:
    self.attention_norm = RMSNorm(self.config)
    self.mlp_norm = RMSNorm(self.config)
    self.mlp = Mlp(self.config)

  def around(
    self,
    x: jax.Array,
    attention: Callable[[jax.Array], tuple[Any, ...]],
    mlp: Callable[[jax.Array], jax.Array] | None = None,
  ) -> tuple[Any, ...]:
    """The whole block, whichever way attention is computed.

    Args:
      x: ``[B, T, D]``.
      attention: from normalised x to its output ``[B, T, D]`` and whatever else it returns.
      mlp: the way to compute the MLP; ``self.mlp`` when None.

    Returns:
      The block's output ``[B, T, D]``, and whatever else attention returned.
    """
    y, *others = attention(self.attention_norm(x))
    x = x + y
    x = x + (mlp or self.mlp)(self.mlp_norm(x))
    return nn.with_logical_constraint(x, ("batch", "length", "embed")), *others


class AnchorBlock(Block):
  """A block with `AnchorAttention`; methods and shapes are its attention's."""

  def setup(self) -> None:
    super().setup()
    self.attention = AnchorAttention(self.config)

  def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, State]:
    """``[B, T, D]`` → the same, and the attention state."""
    return self.around(x, lambda h: self.attention(h, lengths))

  def prefill(self, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, State, LayerCache]:
    """`__call__` that also returns the cache of these tokens."""
    return self.around(x, lambda h: self.attention.prefill(h, lengths))

  def step(
    self, x: jax.Array, cache: LayerCache, positions: jax.Array
  ) -> tuple[jax.Array, AttentionWeights, LayerCache]:
    """One token a row, ``[B, 1, D]``, against the cache."""
    return self.around(x, lambda h: self.attention.step(h, cache, positions), self.mlp.step)

  def step_alone(self, x: jax.Array, cache: LayerCache, positions: jax.Array) -> tuple[jax.Array, LayerCache]:
    """`step` of an anchor that no layer follows."""
    return self.around(x, lambda h: self.attention.step_alone(h, cache, positions), self.mlp.step)


class FollowerBlock(Block):
  """A block with `FollowerAttention`; methods and shapes are its attention's."""

  def setup(self) -> None:
    super().setup()
    self.attention = FollowerAttention(self.config)

  def __call__(self, x: jax.Array, state: State) -> jax.Array:
    """``[B, T, D]`` → the same, with the anchor's state."""
    return self.around(x, lambda h: (self.attention(h, state),))[0]

  def prefill(self, x: jax.Array, state: State) -> tuple[jax.Array, LayerCache]:
    """`__call__` that also returns the cache of these tokens."""
    return self.around(x, lambda h: self.attention.prefill(h, state))

  def step(
    self, x: jax.Array, state: AttentionWeights, cache: LayerCache, positions: jax.Array
  ) -> tuple[jax.Array, LayerCache]:
    """One token a row, ``[B, 1, D]``, against the cache."""
    return self.around(x, lambda h: self.attention.step(h, state, cache, positions), self.mlp.step)
