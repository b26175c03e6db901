"""What the last projections of attention and MLP are fitted to.

Where a block normalises their output before it is added (Gemma 2 and 3), only the output's direction counts. Then every
token is weighed by the inverse of its output's root mean square, so that errors are measured after the norm, and the
MLP's target is the output that the norm would turn into what the dense block adds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sa_jax.analysis.walk import Block, call
from sa_jax.config import ModelConfig
from sa_jax.nn import Middle, PlannedBlock

_SMALL_SCALE = 0.01
"""Channels whose squared scale after the MLP is below this part of the mean are left nearly as they are."""


def weight(config: ModelConfig, y: jax.Array) -> jax.Array | float:
  """How much each token's error counts, ``[B, T, 1]`` of outputs ``[B, T, D]``; 1 where they are not normalised."""
  if not config.post_norms:
    return 1.0
  y = y.astype(jnp.float32)
  return jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_eps)


def of_attention(config: ModelConfig, block: Block, heads: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What W_O maps to what: head outputs ``[B, T, N, H]`` → inputs ``[B, T, N H]`` and targets ``[B, T, D]``.

  Args:
    config: the model.
    block: the layer's parameters; what W_O's bias adds is left as it is.
    heads: of the follower.
    y: the dense attention's output, ``[B, T, D]``.
  """
  by = weight(config, y)
  flat = heads.astype(jnp.float32).reshape(*heads.shape[:2], -1)
  return flat * by, without_bias(block["attention"]["o_proj"], y) * by


def of_mlp(config: ModelConfig, block: Block, middle: Middle, lacking: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the MLP's last projection maps to what: inputs ``[B, T, F]`` and targets ``[B, T, D]``.

  Args:
    config: the model.
    block: the layer's parameters; what the projection's bias adds is left as it is.
    middle: what the MLP reads and is added to.
    lacking: what it should add before the residual scale, ``[B, T, D]``.
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
  # What comes out of a norm has a root mean square of one, before it is scaled.
  wanted = wanted * weight(config, wanted)
  return hidden * by, wanted - (y - without_bias(projection, y)) * by


def without_bias(projection: Block, target: jax.Array) -> jax.Array:
  """The target that the kernel alone must reach."""
  target = target.astype(jnp.float32)
  bias = projection.get("bias")
  return target if bias is None else target - _over_tokens(bias.astype(jnp.float32))


def _over_tokens(vector: jax.Array) -> jax.Array:
  return vector.reshape(1, 1, -1)
