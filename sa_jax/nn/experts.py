"""A mixture of experts instead of an MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sa_jax import ops
from sa_jax.config import Activation, ModelConfig
from sa_jax.nn.attention import projection
from sa_jax.nn.axes import LECUN, Axes, fitting, mesh_axes_of, with_axes
from sa_jax.nn.mlp import Mlp, gated
from sa_jax.nn.split import constrain, divides, mesh_axes, spec_of, splits

ROUTER_SCORES = "router_scores"
"""The collection in which every mixture stores its router's scores ``[B, T, X]``, stacked like its parameters."""

_ADAPTERS = ("lora_a", "lora_b")
_IN_KERNELS: tuple[Activation, ...] = ("silu", "quick_gelu")
"""Activations that kernels can compute."""
_INIT = nn.initializers.lecun_normal(batch_axis=(0,))


class _Stack(nn.Module):
  """One projection of all experts: a kernel ``[X, in, out]``, and its biases and adapters, if any.

  Attributes:
    config: the model.
    features: input and output sizes.
    axes: their logical axes.
  """

  config: ModelConfig
  features: tuple[int, int]
  axes: tuple[str, str]

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    """The arrays in the compute dtype."""
    assert self.config.experts is not None
    init = with_axes(_INIT, ("experts", *self.axes))
    shape = (self.config.experts.count, *self.features)
    arrays = {"kernel": self.param("kernel", init, shape, self.config.param_dtype)}
    if self.config.mlp_bias:
      init_bias = with_axes(nn.initializers.zeros, ("experts", self.axes[1]))
      arrays["bias"] = self.param("bias", init_bias, (shape[0], shape[2]), self.config.param_dtype)
    arrays |= {name: self.get_variable("params", name) for name in _ADAPTERS if self.has_variable("params", name)}
    return {name: jnp.asarray(array).astype(self.config.dtype) for name, array in arrays.items()}


class _Experts(nn.Module):
  """The projections of all experts."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    """The weights for `ops.through_experts`."""
    config = self.config
    wide, narrow = (config.embed_dim, config.mlp_dim), (config.mlp_dim, config.embed_dim)
    return {
      "gate_proj": _Stack(config, wide, ("embed", "mlp"), name="gate_proj")(),
      "up_proj": _Stack(config, wide, ("embed", "mlp"), name="up_proj")(),
      "down_proj": _Stack(config, narrow, ("mlp", "embed"), name="down_proj")(),
    }


class _Router(nn.Module):
  """Scores experts per token."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """``[..., D]`` → float32 ``[..., X]``, even for bfloat16: small differences decide which expert comes next."""
    config = self.config
    assert config.experts is not None
    init, shape = with_axes(LECUN, ("embed", "scores")), (config.embed_dim, config.experts.count)
    kernel = jnp.asarray(self.param("kernel", init, shape, config.param_dtype)).astype(config.dtype)
    scores = jnp.tensordot(x, kernel, axes=1, preferred_element_type=jnp.float32)
    if config.mlp_bias:
      bias = self.param("bias", with_axes(nn.initializers.zeros, ("scores",)), shape[1:], config.param_dtype)
      scores += jnp.asarray(bias).astype(jnp.float32).reshape((1,) * (scores.ndim - 1) + (-1,))
    return scores


class Moe(nn.Module):
  """A router and experts; each token goes through a few of them (Shazeer et al., 1701.06538; Mixtral, 2401.04088).

  Experts have no capacity limit: nothing is dropped, and a token's output does not depend on the rest of its batch.
  """

  config: ModelConfig

  def setup(self) -> None:
    config, experts = self.config, self.config.experts
    assert experts is not None
    self.router = _Router(config)
    self.experts = _Experts(config)
    if experts.shared_width:
      self.shared = Mlp(dataclasses.replace(config, mlp_dim=experts.shared_width, experts=None))
    if experts.shared_gate:
      self.shared_gate = projection(config, 1, ("embed",), ("scores",), name="shared_gate")

  def __call__(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → the same shape."""
    routes = self.routes(x)
    return self._with_shared(x, _on_each_device(self.config, x, routes, self.experts()), cached=False)

  def routes(self, x: jax.Array) -> ops.Routes:
    """Where the router sends tokens ``[B, T, D]``."""
    assert self.config.experts is not None
    scores = constrain(self.router(x), ("batch", "length", "scores"))
    # Stored only if the model is applied with this collection mutable.
    if not self.is_initializing():
      self.sow(ROUTER_SCORES, "scores", scores, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return ops.route(scores, self.config.experts)

  def step(self, x: jax.Array) -> jax.Array:
    """`__call__` for decoding: with one token per row, ``[B, 1, D]``, it reads only the chosen experts' weights."""
    if x.shape[1] != 1 or not _is_whole():
      return self(x)
    weights, flat = self.experts(), x[:, 0]
    kernels = self.config.activation in _IN_KERNELS and ops.has_few_kernels(flat, weights)
    routes = jax.tree.map(lambda each: each[:, 0], self.routes(x))
    if kernels or routes.experts.size < weights["down_proj"]["kernel"].shape[0]:
      y = ops.through_few(flat, routes, weights, gated(self.config), kernels)
    else:
      y = ops.through_experts(flat, routes, weights, gated(self.config))
    return self._with_shared(x, y[:, None], cached=True)

  def _with_shared(self, x: jax.Array, y: jax.Array, cached: bool) -> jax.Array:
    """The experts' output ``y``, plus the shared expert's, if there is one."""
    assert self.config.experts is not None
    if self.config.experts.shared_width:
      shared = (self.shared.step if cached else self.shared)(x)
      if self.config.experts.shared_gate:
        shared = shared * jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32)).astype(shared.dtype)
      y = y + shared
    return constrain(y, ("batch", "length", "embed"))


def _is_whole() -> bool:
  """Whether arrays are not sharded over a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def _through(
  config: ModelConfig,
  x: jax.Array,
  routes: ops.Routes,
  weights: Mapping[str, Mapping[str, jax.Array]],
  first: jax.Array | None = None,
) -> jax.Array:
  """`ops.through_experts` for ``[B, T, D]``."""
  flat = x.reshape(-1, x.shape[-1])
  paths = jax.tree.map(lambda each: each.reshape(flat.shape[0], -1), routes)
  return ops.through_experts(flat, paths, weights, gated(config), first).reshape(x.shape)


# Logical axes per projection; adapters have those of their kernel, minus the axis that they lack.
_INPUTS: dict[str, tuple[str | None, str | None]] = {
  "gate_proj": (None, "mlp"), "up_proj": (None, "mlp"), "down_proj": ("mlp", None),
}  # fmt: skip


def _axes(name: str, part: str) -> Axes:
  """The logical axes of an array of an expert's projection; every device needs all of ``embed``."""
  inputs, outputs = _INPUTS[name]
  axes = {"kernel": (inputs, outputs), "bias": (outputs,), "lora_a": (inputs, None), "lora_b": (None, outputs)}
  return ("experts", *axes[part])


def _on_each_device(
  config: ModelConfig, x: jax.Array, routes: ops.Routes, weights: dict[str, dict[str, jax.Array]]
) -> jax.Array:
  """The experts' output for ``[B, T, D]``. On a mesh, each device sorts its tokens locally and holds some experts.

  Devices with different experts all-gather their tokens, apply their own experts, and reduce-scatter the outputs: two
  exchanges of ``[B, T, D]``, however many experts a token has.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not (splits(mesh) and nn.get_logical_axis_rules()):
    return _through(config, x, routes, weights)
  rows = spec_of(("batch", "length", None))
  if not divides(mesh, rows, x.shape):
    rows = PartitionSpec()
  split = lambda name, part, leaf: fitting(spec_of(_axes(name, part)), leaf.shape, mesh.shape)
  specs = {name: {part: split(name, part, leaf) for part, leaf in parts.items()} for name, parts in weights.items()}
  over_experts = mesh_axes("experts", weights["down_proj"]["kernel"].shape[0], mesh)
  over_features = mesh_axes("mlp", config.mlp_dim, mesh)
  of_rows = {axis for entry in rows for axis in mesh_axes_of(entry)}
  gathered = tuple(axis for axis in over_experts if axis in of_rows)
  summed = tuple(axis for axis in (*over_experts, *over_features) if axis not in gathered)

  def of_a_device(x: jax.Array, routes: ops.Routes, weights: dict[str, dict[str, jax.Array]]) -> jax.Array:
    first = None
    if over_experts:
      first = jax.lax.axis_index(over_experts) * weights["down_proj"]["kernel"].shape[0]
    if gathered:
      x, routes = (
        jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, gathered, axis=0, tiled=True), each) for each in (x, routes)
      )
    if over_features and config.mlp_bias:
      # Each device has part of the features and outputs are summed, so only one device adds the bias.
      is_first = jax.lax.axis_index(over_features) == 0
      down = weights["down_proj"]
      weights = weights | {"down_proj": down | {"bias": jnp.where(is_first, down["bias"], 0)}}
    y = _through(config, x, routes, weights, first)
    y = jax.lax.psum(y, summed) if summed else y
    return jax.lax.psum_scatter(y, gathered, scatter_dimension=0, tiled=True) if gathered else y

  in_specs = (rows, rows, specs)
  return jax.shard_map(of_a_device, in_specs=in_specs, out_specs=rows, check_vma=False)(x, routes, weights)
