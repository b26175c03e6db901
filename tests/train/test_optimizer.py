"""The schedule at its corners, what is decayed, and clipping, by closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.sharding import abstract_params
from sa_jax.train import OptimizerConfig, make_optimizer, schedule
from sa_jax.train.optimizer import decayed
from tests import tiny


@pytest.fixture(autouse=True)
def relaxed():
  """Optax promotes types; the train step allows it to."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def test_schedule():
  rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.25), 110)
  found = [float(rate(step)) for step in (0, 5, 10, 60, 110, 200)]
  np.testing.assert_allclose(found, [0, 1, 2, 2 * (0.25 + 0.75 * 0.5), 0.5, 0.5], rtol=1e-6)
  # Without warm-up it begins at the top; a run that is shorter than the warm-up still ends.
  assert float(schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=0), 10)(0)) == 2.0
  assert float(schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=1000), 10)(9)) == 2.0
  with pytest.raises(ValueError, match="at least 1 step, not 0"):
    schedule(OptimizerConfig(), 0)


def test_sinks_are_not_decayed():
  anchor = decayed(abstract_params(tiny.model(sinks=True)))["runs"]["1"]["anchor"]
  assert not anchor["attention"]["sinks"]
  assert anchor["attention"]["q_proj"]["kernel"]


def test_norms_and_biases_are_not_decayed():
  tree = decayed(abstract_params(tiny.model(qkv_bias=True)))
  attention = tree["runs"]["1"]["anchor"]["attention"]
  assert attention["q_proj"] == {"kernel": True, "bias": False}
  assert tree["embed"]["embedding"]
  assert not tree["final_norm"]["scale"]


def test_an_update_by_hand():
  """Adam's first update is the sign of the gradient; clipping does not change it, decay adds its part."""
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1e-3)
  optimizer = make_optimizer(config, 10)
  params = {"kernel": jnp.asarray([2.0]), "scale": jnp.asarray([2.0])}
  updates, _ = optimizer.update(
    {"kernel": jnp.asarray([3.0]), "scale": jnp.asarray([-4.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.5 * 2), rtol=1e-3)
  np.testing.assert_allclose(updates["scale"], 0.1, rtol=1e-3)


def test_what_makes_no_sense():
  with pytest.raises(
    ValueError, match=r"learning_rate=0 \(must be a positive number\)\n  b2=1.0 \(must be 0 to below 1"
  ):
    OptimizerConfig(learning_rate=0, b2=1.0)
