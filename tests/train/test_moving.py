"""A train state saved on 8 devices, restored on 2, saved there and restored on 1: the same to the bit.

With SA_JAX_GPUS=N in the environment, N instead of 8 devices, which are GPUs.
"""

import os

import jax
import numpy as np

from sa_jax.sharding import abstract_params, make_mesh, param_shardings
from sa_jax.train import OptimizerConfig, make_optimizer, make_state, state_shardings
from sa_jax.train.checkpoints import Checkpoints
from tests import tiny
from tests.tiny import assert_trees_equal

MOST = int(os.environ.get("SA_JAX_GPUS", "8"))


def test_from_8_devices_to_2_to_1(tmp_path):
  model = tiny.model("0:1", num_layers=2, vocab_size=64)
  optimizer = make_optimizer(OptimizerConfig(), 10)
  params = abstract_params(model)
  shapes = jax.eval_shape(lambda params: make_state(optimizer, params), params)
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda leaf: (100 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)

  def on(count):
    """The state's shapes, split over so many devices."""
    mesh = make_mesh(fsdp=count, devices=jax.devices()[:count])
    shardings = state_shardings(optimizer, params, param_shardings(model, mesh))
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(like, shapes, shardings)

  moved = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, on(MOST)))
  for step, count in enumerate((2, 1), start=1):
    with Checkpoints(tmp_path / str(count), keep=1) as checkpoints:
      checkpoints.save(step, moved, {"step": step})
      checkpoints.wait()
      _, moved, extra = checkpoints.restore(on(count))
    assert extra == {"step": step}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(moved)} == {count}
    embedding = moved.params["embed"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (64, 32 // count)
    assert_trees_equal(moved, state)
