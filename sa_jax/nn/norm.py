"""Normalisation with a learned scale."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.axes import with_axes


class RMSNorm(nn.Module):
  """Root mean square normalisation over the last axis; see `sa_jax.ops.rms_norm` and `sa_jax.ops.rms_norm_about_one`.

  Attributes:
    config: its ``norm_about_one`` says which of the two.
    axis: the logical axis that is normalised over.
  """

  config: ModelConfig
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    init = nn.initializers.zeros if config.norm_about_one else nn.initializers.ones
    scale = self.param("scale", with_axes(init, (self.axis,)), (x.shape[-1],), config.param_dtype)
    return (ops.rms_norm_about_one if config.norm_about_one else ops.rms_norm)(x, jnp.asarray(scale), config.norm_eps)
