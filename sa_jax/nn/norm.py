"""Normalisation with a learned scale, or none."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.axes import of_vector, with_axes


class Norm(nn.Module):
  """Normalisation over the last axis or axes; see `sa_jax.ops.rms_norm` and the functions next to it.

  Attributes:
    config: ``norm``, ``norm_bias`` and ``norm_about_one`` select the norm.
    axes: the logical axes that are jointly normalised over.
  """

  config: ModelConfig
  axes: tuple[str, ...] = ("embed",)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    shape = x.shape[-len(self.axes) :]
    init = nn.initializers.zeros if config.norm_about_one else nn.initializers.ones
    vector = lambda name, init: jnp.asarray(
      self.param(name, with_axes(init, of_vector(self.axes)), shape, config.param_dtype)
    ).reshape(-1)
    scale = vector("scale", init)
    flat = x.reshape(*x.shape[: -len(self.axes)], -1)
    if config.norm == "rms":
      y = (ops.rms_norm_about_one if config.norm_about_one else ops.rms_norm)(flat, scale, config.norm_eps)
    else:
      bias = vector("bias", nn.initializers.zeros) if config.norm_bias else None
      y = ops.layer_norm(flat, scale.astype(jnp.float32) + float(config.norm_about_one), config.norm_eps, bias)
    return y.reshape(x.shape)


class Unchanged(nn.Module):
  """The identity, for a norm that a model does not have."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return x


def norm_if(present: bool, config: ModelConfig) -> Norm | Unchanged:
  """A norm over ``embed``, if present, otherwise the identity."""
  return Norm(config) if present else Unchanged()
