"""The MLPs of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sa_jax import ops
from sa_jax.config import Activation, MlpKind, ModelConfig
from sa_jax.nn.attention import projection
from sa_jax.nn.split import constrain, on_each_device

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def gated(config: ModelConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The input of a gated MLP's last projection, as a function of its gate and up outputs."""
  activation, clamp = ACTIVATIONS[config.activation], config.mlp_clamp
  if clamp is None:
    return lambda gate, up: activation(gate) * up
  return lambda gate, up: activation(jnp.minimum(gate, clamp)) * (1 + jnp.clip(up, -clamp, clamp))


def is_swiglu(config: ModelConfig) -> bool:
  """Whether a gated MLP is ``silu(gate) * up``, which kernels can compute."""
  return config.activation == "silu" and config.mlp_clamp is None


class Mlp(nn.Module):
  """``down(f(gate(x)) * up(x))`` with the config's activation ``f`` (SwiGLU, GeGLU; Shazeer, arXiv 2002.05202)."""

  config: ModelConfig

  def setup(self) -> None:
    config = self.config
    bias = config.mlp_bias
    self.gate_proj = projection(config, config.mlp_dim, ("embed",), ("mlp",), name="gate_proj", bias=bias)
    self.up_proj = projection(config, config.mlp_dim, ("embed",), ("mlp",), name="up_proj", bias=bias)
    self.down_proj = projection(config, config.embed_dim, ("mlp",), ("embed",), name="down_proj", bias=bias)

  def __call__(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → the same shape."""
    return self.down_proj(self.hidden(x))

  def hidden(self, x: jax.Array) -> jax.Array:
    """The last projection's input: ``[B, T, D]`` → ``[B, T, F]``."""
    hidden = gated(self.config)(self.gate_proj(x), self.up_proj(x))
    return constrain(hidden, ("batch", "length", "mlp"))

  def step(self, x: jax.Array) -> jax.Array:
    """`__call__` for decoding: with one token per row, ``[B, 1, D]``, it is bound by reading the weights."""
    params = [module.variables["params"] for module in (self.gate_proj, self.up_proj)]
    plain = is_swiglu(self.config) and all(len(each) == 1 for each in params)  # no bias, no adapters
    if x.shape[1] != 1 or not plain:
      return self(x)

    def kernel(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array | None:
      return ops.gated_linear(x, gate, up) if ops.has_linear_kernels(x, gate, up) else None

    columns = (None, "mlp")
    hidden = on_each_device(kernel, (("batch", None), columns, columns), ("batch", "mlp"))
    gated = hidden(x[:, 0], *(each["kernel"] for each in params))
    return self(x) if gated is None else self.down_proj(gated[:, None])


class PlainMlp(Mlp):
  """``down(f(up(x)))``."""

  def setup(self) -> None:
    config = self.config
    bias = config.mlp_bias
    self.up_proj = projection(config, config.mlp_dim, ("embed",), ("mlp",), name="up_proj", bias=bias)
    self.down_proj = projection(config, config.embed_dim, ("mlp",), ("embed",), name="down_proj", bias=bias)

  def hidden(self, x: jax.Array) -> jax.Array:
    """The last projection's input: ``[B, T, D]`` → ``[B, T, F]``."""
    hidden = ACTIVATIONS[self.config.activation](self.up_proj(x))
    return constrain(hidden, ("batch", "length", "mlp"))

  def step(self, x: jax.Array) -> jax.Array:
    """`__call__`: there is no kernel for it."""
    return self(x)


MLPS: dict[MlpKind, type[Mlp]] = {"gated": Mlp, "plain": PlainMlp}
"""MLP types by the config's ``mlp``."""
