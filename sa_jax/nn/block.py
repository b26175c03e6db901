"""Transformer blocks: attention and MLP, each with a pre-norm, a post-norm or both, and a residual."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.attention import AnchorAttention, FollowerAttention, MixedAttention
from sa_jax.nn.cache import LayerCache
from sa_jax.nn.experts import Moe
from sa_jax.nn.mlp import MLPS, Mlp
from sa_jax.nn.norm import norm_if
from sa_jax.nn.split import constrain
from sa_jax.nn.state import AttentionWeights, Kind, QueryKey, State

BLOCK_OUTPUTS = "block_outputs"
"""The collection in which every block stores its output ``x [B, T, D]``, stacked like its parameters."""


@struct.dataclass
class Middle:
  """A block's state between attention and MLP.

  Attributes:
    x: ``[B, T, D]``, the block's input plus its attention.
    before: the block's input, if the MLP reads that; None if it reads x.
  """

  x: jax.Array
  before: jax.Array | None = None

  @property
  def read(self) -> jax.Array:
    """The MLP's input."""
    return self.x if self.before is None else self.before


class Block(nn.Module):
  """A block around an attention layer.

  Subclasses may set other MLP and attention types with the same methods; by default the config selects the MLP.
  """

  config: ModelConfig

  mlp_type: ClassVar[type[Mlp] | type[Moe] | None] = None

  def setup(self) -> None:
    config = self.config
    self.attention_norm = norm_if(config.pre_norms, config)
    self.mlp_norm = self.attention_norm if config.shared_norm else norm_if(config.pre_norms, config)
    self.mlp = (self.mlp_type or (Moe if config.experts else MLPS[config.mlp]))(config)
    self.attention_post_norm = norm_if(config.post_norms, config)
    self.mlp_post_norm = norm_if(config.post_norms, config)

  def rest(self, x: jax.Array, y: jax.Array, cached: bool = False) -> jax.Array:
    """The block's output from its input and its attention's output, each ``[B, T, D]``.

    ``cached`` says that x holds new tokens of a cached sequence: then kernels may compute the MLP.
    """
    return self.add_mlp(self.add_attention(x, y), cached)

  def add_attention(self, x: jax.Array, y: jax.Array) -> Middle:
    """Adds the attention's output to the block's input, both ``[B, T, D]``."""
    added = x + _scaled(self.attention_post_norm(y), self.config.residual_scale)
    return Middle(added, x if self.config.parallel else None)

  def add_mlp(self, middle: Middle, cached: bool = False) -> jax.Array:
    """The block's output ``[B, T, D]``; ``cached`` as in `rest`."""
    y = (self.mlp.step if cached else self.mlp)(self.mlp_norm(middle.read))
    x = middle.x + _scaled(self.mlp_post_norm(y), self.config.residual_scale)
    x = constrain(x, ("batch", "length", "embed"))
    # Stored only if the model is applied with this collection mutable.
    if not self.is_initializing():
      self.sow(BLOCK_OUTPUTS, "x", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x


def _scaled(x: jax.Array, scale: float) -> jax.Array:
  # In float32, so that the scale is not rounded to the dtype of x.
  return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class AnchorBlock(Block):
  """A block with `AnchorAttention`; methods and shapes as there."""

  attention_type: ClassVar[type[AnchorAttention]] = AnchorAttention

  def setup(self) -> None:
    super().setup()
    self.attention = self.attention_type(self.config)

  def __call__(self, x: jax.Array, rows: ops.Rows = ops.Rows(), kind: Kind = 0) -> tuple[jax.Array, State]:
    """``[B, T, D]`` → the same shape, and the attention state."""
    y, state, _ = self.attention.prefill(self.attention_norm(x), rows, kind)
    return self.rest(x, y), state

  def prefill(self, x: jax.Array, rows: ops.Rows, kind: Kind) -> tuple[jax.Array, State, LayerCache]:
    """`__call__` that also returns the cache of these tokens."""
    y, state, cache = self.attention.prefill(self.attention_norm(x), rows, kind)
    return self.rest(x, y), state, cache

  def extend(
    self, x: jax.Array, cache: LayerCache, rows: ops.Rows, kind: int = 0, followed: bool = True
  ) -> tuple[jax.Array, AttentionWeights | None, LayerCache]:
    """New tokens ``[B, T, D]`` with the cache."""
    y, state, cache = self.attention.extend(self.attention_norm(x), cache, rows, kind, followed)
    return self.rest(x, y, cached=True), state, cache


class FollowerBlock(Block):
  """A block with `FollowerAttention`; methods and shapes as there."""

  attention_type: ClassVar[type[FollowerAttention]] = FollowerAttention

  def setup(self) -> None:
    super().setup()
    self.attention = self.attention_type(self.config)

  def __call__(self, x: jax.Array, state: State) -> jax.Array:
    """``[B, T, D]`` → the same shape, using the anchor's state."""
    y, _ = self.attention.prefill(self.attention_norm(x), state)
    return self.rest(x, y)

  def prefill(self, x: jax.Array, state: State) -> tuple[jax.Array, LayerCache]:
    """`__call__` that also returns the cache of these tokens."""
    y, cache = self.attention.prefill(self.attention_norm(x), state)
    return self.rest(x, y), cache

  def extend(
    self, x: jax.Array, state: AttentionWeights, cache: LayerCache, rows: ops.Rows
  ) -> tuple[jax.Array, LayerCache]:
    """New tokens ``[B, T, D]`` with the cache."""
    y, cache = self.attention.extend(self.attention_norm(x), state, cache, rows)
    return self.rest(x, y, cached=True), cache


class MixedBlock(Block):
  """A block with `MixedAttention`: a follower that still has an `AnchorBlock`'s parameters."""

  def setup(self) -> None:
    super().setup()
    self.attention = MixedAttention(self.config)

  def __call__(self, x: jax.Array, state: QueryKey, share: jax.Array | float, kind: Kind) -> jax.Array:
    """``[B, T, D]`` → the same shape, using the anchor's state and its own; arguments as in `MixedAttention.mix`."""
    return self.rest(x, self.attention.mix(self.attention_norm(x), state, share, kind))


class Blocks(NamedTuple):
  """The block types of a model.

  Attributes:
    anchor: an anchor's block type, `AnchorBlock` or a subclass.
    follower: a follower's block type, `FollowerBlock` or a subclass.
  """

  anchor: type[AnchorBlock] = AnchorBlock
  follower: type[FollowerBlock] = FollowerBlock

  @property
  def own(self) -> list[str]:
    """Names of user-defined block types, which no config describes."""
    return [block.__name__ for block, ours in zip(self, Blocks()) if block is not ours]
