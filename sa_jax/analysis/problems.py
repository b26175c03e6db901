"""The least-squares problems for the output projections of attention and MLP.

If a block normalises their output before it is added (Gemma 2 and 3), only the output's direction matters. Then each
token is weighted by the inverse root mean square of its output, so that errors are measured after the norm, and the
MLP's target is the output that the norm would map to what the dense block adds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sa_jax.analysis.walk import Block, call
from sa_jax.config import ModelConfig
from sa_jax.nn import Middle, PlannedBlock

_SMALL_SCALE = 0.01
"""Channels whose squared post-MLP scale is below this fraction of the mean are kept nearly unchanged."""


def weight(config: ModelConfig, y: jax.Array) -> jax.Array | float:
  """Weight of each token's error, ``[B, T, 1]`` for outputs ``[B, T, D]``; 1 without a post-norm."""
  if not config.post_norms:
    return 1.0
  y = y.astype(jnp.float32)
  return jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_eps)


def of_attention(config: ModelConfig, block: Block, heads: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """W_O's regression problem: head outputs ``[B, T, N, H]`` → inputs ``[B, T, N H]`` and targets ``[B, T, D]``.

  Args:
    config: the model.
    block: the layer's parameters; W_O's bias is kept.
    heads: the follower's head outputs.
    y: the dense attention's output, ``[B, T, D]``.
  """
  by = weight(config, y)
  flat = heads.astype(jnp.float32).reshape(*heads.shape[:2], -1)
  return flat * by, without_bias(block["attention"]["o_proj"], y) * by


def of_mlp(config: ModelConfig, block: Block, middle: Middle, lacking: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The MLP down projection's regression problem: inputs ``[B, T, F]`` and targets ``[B, T, D]``.

  Args:
    config: the model.
    block: the layer's parameters; the projection's bias is kept.
    middle: the block's input with its attention added.
    lacking: what the MLP should add before the residual scale, ``[B, T, D]``.
  """
  hidden = call(config, block, PlannedBlock.mlp_hidden, middle).astype(jnp.float32)
  projection, lacking = block["mlp"]["down_proj"], lacking.astype(jnp.float32)
  if not config.post_norms:
    return hidden, without_bias(projection, lacking)
  y = call(config, block, PlannedBlock.mlp_output, hidden.astype(middle.x.dtype)).astype(jnp.float32)
  by = weight(config, y)
  scale = _over_tokens(block["mlp_post_norm"]["scale"].astype(jnp.float32) + float(config.norm_about_one))
  square = jnp.square(scale)
  wanted = y * by + scale / (square + _SMALL_SCALE * square.mean()) * (lacking - scale * y * by)
  # A norm's output has a root mean square of 1, before its scale.
  wanted = wanted * weight(config, wanted)
  return hidden * by, wanted - (y - without_bias(projection, y)) * by


def without_bias(projection: Block, target: jax.Array) -> jax.Array:
  """The target for the kernel alone."""
  target = target.astype(jnp.float32)
  bias = projection.get("bias")
  return target if bias is None else target - _over_tokens(bias.astype(jnp.float32))


def _over_tokens(vector: jax.Array) -> jax.Array:
  return vector.reshape(1, 1, -1)
