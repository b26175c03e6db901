"""Caches and optimiser state live where the rules say: bytes on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax import nn
from sa_jax.sharding import abstract_params, cache_shardings, named_sharding, optimizer_shardings, param_shardings
from tests import tiny


@pytest.fixture
def mesh():
  return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def on_a_device(tree) -> int:
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_cache(mesh):
  model = tiny.model()
  cache = nn.Cache.empty(model.config, model.plan, 4, 16)
  placed = jax.device_put(cache, cache_shardings(model, mesh))
  # Rows over data and fsdp, heads over tensor.
  assert on_a_device(placed) * 8 == cache.nbytes
  assert placed.layers[0].values.addressable_shards[0].data.shape == (1, 1, 16, 8)


def test_optimizer_state_lies_with_its_parameters(mesh):
  model = tiny.model(vocab_size=64)
  optimizer = optax.adamw(1e-3)
  shardings = param_shardings(model, mesh)
  placed = optimizer_shardings(optimizer, abstract_params(model), shardings)
  state = jax.jit(optimizer.init, out_shardings=placed)(tiny.params(model, layout="runs"))
  params = jax.device_put(tiny.params(model, layout="runs"), shardings)
  counters = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
  assert on_a_device(state) - counters == 2 * on_a_device(params)
  same = jax.tree.map(lambda m, p: m.sharding == p.sharding, optax.tree.get(state, "mu"), params)
  assert all(jax.tree.leaves(same))


def test_token_rows(mesh):
  rows = jax.device_put(jnp.zeros((8, 5), jnp.int32), named_sharding(mesh, ("batch", "length")))
  assert rows.addressable_shards[0].data.shape == (2, 5)
  assert np.prod(list(mesh.shape.values())) == 8
