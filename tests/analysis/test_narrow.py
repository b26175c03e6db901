"""Narrow values against NumPy, where they are exact, and as a whole model's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import narrow
from sa_jax.analysis.refit import Refit, refit
from sa_jax.analysis.ridge import Sums
from tests import tiny

CONFIG = tiny.config(vocab_size=47, num_layers=4, qkv_bias=True)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(4))
TOKENS = np.random.default_rng(0).integers(0, 47, (16, 16), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


def root(matrix, power):
  values, axes = np.linalg.eigh(matrix)
  return axes * values**power @ axes.T


def test_directions_against_numpy():
  """The projection of values and W_O is that of the singular vectors; the rank is data."""
  rng = np.random.default_rng(1)
  outputs, kernel = rng.normal(size=(300, 4, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(4, 6, 9))
  flat = outputs.reshape(300, 24)
  for rank in (2, 5):
    kept = narrow.directions(jnp.float32(flat.T @ flat), jnp.float32(kernel), 2, rank)
    for head in range(2):
      mine = outputs[:, 2 * head : 2 * head + 2].reshape(-1, 6)
      half = root(mine.T @ mine, 0.5)
      stacked = np.concatenate(kernel[2 * head : 2 * head + 2], axis=1)
      left = np.linalg.svd(half @ stacked)[0][:, :rank]
      want = np.linalg.inv(half) @ left @ left.T @ half
      np.testing.assert_allclose(kept.down[head] @ kept.up[head], want, atol=2e-4)
      assert (np.asarray(kept.down[head])[:, rank:] == 0).all()
    along = narrow.along(Sums.of(jnp.float32(flat), jnp.float32(rng.normal(size=(300, 9)))), kept)
    numbers = np.einsum("TNH,NHR->TNR", outputs, np.repeat(kept.down, 2, axis=0)).reshape(300, 24)
    np.testing.assert_allclose(along.gram, numbers.T @ numbers, atol=1e-3)


def test_exact_where_the_output_reads_few_directions(params):
  """W_O that reads 3 directions of a key head's 8 values, by all of its query heads: biases too."""
  rng = np.random.default_rng(2)
  layers = {}
  for layer, block in params["layers"].items():
    plane = np.linalg.qr(rng.normal(size=(2, 8, 3)))[0]
    projector = np.repeat(plane @ plane.swapaxes(1, 2), 2, axis=0)
    kernel = jnp.float32(projector @ np.asarray(block["attention"]["o_proj"]["kernel"]))
    layers[layer] = block | {"attention": block["attention"] | {"o_proj": {"kernel": kernel}}}
  flat = params | {"layers": layers}
  made = refit(DENSE, flat, DENSE.plan, TOKENS, Refit(value_dim=3), chunk=16)
  assert made.model.config == dataclasses.replace(CONFIG, value_dim=3)
  assert made.params["layers"]["2"]["attention"]["v_proj"]["bias"].shape == (2, 3)
  text = np.random.default_rng(3).integers(0, 47, (2, 16), np.int32)
  got, wanted = made.model.apply({"params": made.params}, text), DENSE.apply({"params": flat}, text)
  np.testing.assert_allclose(got, wanted, atol=5e-4)
  assert len(made.reports) == 4
  assert all(report.after < 1e-6 for report in made.reports)


def test_with_followers_and_everything_else(params):
  """More numbers leave less error, narrow values go with maps, MLPs and reconstruction, and narrow further."""
  plan = sa_jax.SharingPlan.parse("1:2", 4)
  error = {}
  for width in (2, 6):
    made = refit(DENSE, params, plan, TOKENS, Refit(value_dim=width, maps=True, mlp=True, local_epochs=1), chunk=16)
    assert made.model.config.value_dim == width
    assert set(made.params["layers"]["2"]["attention"]) == {"v_proj", "o_proj"}
    error[width] = np.mean([report.after for report in made.reports if report.part == "attention"])
    assert [report.layer for report in made.reports if report.part == "group"] == [0, 1, 3]
    logits = made.model.apply({"params": made.params}, TOKENS[:1])
    assert np.isfinite(logits).all()
  assert error[6] < error[2]
  # A narrow model is one to share and narrow further.
  again = refit(
    made.model.clone(plan=DENSE.plan),
    narrow.cut(params, 6),
    plan,
    TOKENS,
    Refit(value_dim=2),
    chunk=16,
  )
  assert again.params["layers"]["0"]["attention"]["o_proj"]["kernel"].shape == (4, 2, 32)
  with pytest.raises(ValueError, match="value_dim=6 .must be less than the model's 6"):
    refit(again.model.clone(config=made.model.config), narrow.cut(params, 6), plan, TOKENS, Refit(value_dim=6))
