"""The real train step against the PyTorch reference, under every remat policy; accumulation; what is not finite."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sa_jax
from sa_jax import SharingPlan, Transformer
from sa_jax.formats.table import entries
from sa_jax.train import Batch, OptimizerConfig, make_eval, make_optimizer, make_state, make_step, next_token
from tests import tiny
from tests.conftest import REFERENCE


def batch_of(rows, length, seed=0):
  weights = np.random.default_rng(seed).uniform(size=(rows, length)).astype(np.float32)
  return Batch(jnp.asarray(tiny.tokens(rows, length, seed=seed)), jnp.asarray(weights))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("folder", "state", "remat"),
  [
    ("llama-gqa-8l", "query_key", "none"),
    ("llama-mha-6l", "query_key", "full"),
    ("llama-mha-6l", "query_key", "dots"),
    ("llama-mha-6l", "attention_weights", "full"),
  ],
)
def test_loss_and_gradients_are_the_references(folder, state, remat):
  """Plain gradient descent at rate 1: what a parameter lost is its gradient."""
  reference = REFERENCE / folder
  followers = json.loads((reference / "sharing.json").read_text())["shared_layers"]
  depth = json.loads((reference / "config.json").read_text())["num_hidden_layers"]
  plan = SharingPlan.from_followers(depth, followers)
  model, params = sa_jax.from_pretrained(reference, plan)
  model = Transformer(dataclasses.replace(model.config, attention_state=state, remat=remat), plan)
  expected = tiny.arrays_of(reference / "expected.npz")
  tokens = jnp.asarray(expected["input_ids"], jnp.int32)
  before, optimizer = jax.tree.map(np.asarray, params), optax.sgd(1.0)
  step = make_step(next_token(model), optimizer)
  after, metrics = step(make_state(optimizer, params), None, Batch(tokens, jnp.ones(tokens.shape, jnp.float32)))
  assert float(metrics.loss) == pytest.approx(float(expected["loss"]), abs=1e-5)
  assert float(metrics.weight) == tokens.shape[0] * (tokens.shape[1] - 1)

  gradients = sa_jax.unstack(jax.tree.map(lambda old, new: old - np.asarray(new), before, after.params), plan)
  wanted = {
    name.removeprefix("grad_norm/"): float(expected[name]) for name in expected if name.startswith("grad_norm/")
  }
  found = {}
  for entry in entries(model.config):
    node = functools.reduce(lambda node, name: node.get(name, {}), entry.path, gradients)
    if not isinstance(node, dict):
      found[entry.key] = float(np.linalg.norm(node))
  assert found.keys() == wanted.keys()
  assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
  assert float(metrics.grad_norm) == pytest.approx(np.linalg.norm(list(wanted.values())), rel=1e-4)


@pytest.fixture(scope="module")
def small():
  model = tiny.model("0:1", num_layers=2)
  return model, jax.tree.map(jnp.asarray, tiny.params(model, "runs"))


def test_accumulated_four_times_two_is_once_eight(small):
  """Also where parts weigh differently."""
  model, params = small
  optimizer = optax.sgd(1.0)
  batch = batch_of(8, 12)
  once, four = (
    make_step(next_token(model, z_loss=1e-3), optimizer, accumulate=parts)(make_state(optimizer, params), None, batch)
    for parts in (1, 4)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), once, four)
  assert float(once[1].weight) == pytest.approx(float(batch.weights[:, 1:].sum()), rel=1e-6)


def test_what_does_not_divide_is_said_before_compilation(small):
  model, params = small
  optimizer = optax.sgd(1.0)
  step = make_step(next_token(model), optimizer, accumulate=3)
  with pytest.raises(ValueError, match="8 rows cannot be accumulated in 3 equal parts"):
    step(make_state(optimizer, params), None, batch_of(8, 12))
  with pytest.raises(ValueError, match="at least 1, not 0"):
    make_step(next_token(model), optimizer, accumulate=0)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small):
  model, params = small
  optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
  traces = []

  def objective(*arguments):
    traces.append(arguments)
    return next_token(model)(*arguments)

  step = make_step(objective, optimizer)
  state = make_state(optimizer, params)
  good = batch_of(2, 12)
  bad = Batch(good.tokens, good.weights.at[0, 3].set(jnp.nan))
  state, metrics = step(state, None, good)
  assert metrics.finite == 1
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  for count in (1, 2):
    state, metrics = step(state, None, bad)
    assert metrics.finite == 0
    tiny.assert_trees_equal(before, jax.tree.map(np.asarray, (state.params, state.opt_state)))
    assert (state.step, state.skipped, state.skipped_in_row) == (1 + count, count, count)
  state, metrics = step(state, None, good)
  assert (state.step, state.skipped, state.skipped_in_row) == (4, 2, 0)
  assert metrics.finite == 1
  assert len(traces) == 1


def test_nothing_to_predict_is_no_fault(small):
  model, params = small
  optimizer = optax.sgd(1.0)
  batch = Batch(jnp.asarray(tiny.tokens(2, 12)), jnp.zeros((2, 12), jnp.float32))
  state, metrics = make_step(next_token(model), optimizer)(make_state(optimizer, params), None, batch)
  assert (metrics.loss, metrics.grad_norm, metrics.weight, metrics.finite) == (0, 0, 0, 1)
  tiny.assert_trees_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, state.params))


def test_bfloat16_computation_over_float32_parameters(small):
  model, params = small
  half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"), model.plan)
  optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
  state, metrics = make_step(next_token(half), optimizer)(make_state(optimizer, params), None, batch_of(2, 12))
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  total, weight = make_eval(next_token(model))(params, None, batch_of(2, 12))
  # The state had a copy.
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  assert metrics.loss != total / weight
  assert float(metrics.loss) == pytest.approx(float(total / weight), rel=2e-2)


def test_a_state_copies_parameters_or_takes_them(small):
  _, params = small
  optimizer = make_optimizer(OptimizerConfig(), 10)
  copy = make_state(optimizer, params)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  taken = make_state(optimizer, copy.params, donate=True)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy.params))
  tiny.assert_trees_equal(jax.tree.map(np.asarray, taken.params), jax.tree.map(np.asarray, params))
