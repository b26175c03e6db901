"""Training a mixture of experts: what keeps its routers balanced, and what a run says of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.train import Batch, LogConfig, RouterConfig, next_token, train
from sa_jax.train.metrics import of_routers
from tests import tiny
from tests.train.tiny_run import SHAPE, config

EXPERTS = ops.Experts(4, 2)
TOKENS = tiny.tokens(4, 10)
SEGMENTS = np.where(np.arange(10) < [[10], [7], [9], [4]], 1, 0).astype(np.int32)


def test_the_load_balance_loss_is_transformers():
  """Of each layer by itself, padding left out; and the squared logarithm is the literal one."""
  torch = pytest.importorskip("torch")
  mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
  scores = np.random.default_rng(0).normal(size=(3, 4, 10, 4)).astype(np.float32) * 2
  found = jax.jit(lambda scores: ops.balance(scores, EXPERTS, jnp.asarray(SEGMENTS > 0)))(scores)
  mask, number = torch.from_numpy(SEGMENTS), SEGMENTS.sum()
  each = [mixtral.load_balancing_loss_func((torch.from_numpy(layer.reshape(-1, 4)),), 4, 2, mask) for layer in scores]
  assert float(found.load_balance) / number == pytest.approx(np.mean([float(one) for one in each]), rel=1e-5)
  literal = np.log(np.exp(scores.astype(np.float64)).sum(-1)) ** 2
  assert float(found.z) == pytest.approx((literal * SEGMENTS).sum() / 3, rel=1e-5)
  np.testing.assert_array_equal(found.tokens.sum(axis=-1), 2 * number)


def test_the_objective_adds_its_losses_and_tells_them():
  model = tiny.model("0:1", num_layers=2, experts=EXPERTS)
  params = tiny.params(model, layout="runs")
  batch = Batch(TOKENS, (SEGMENTS * (np.arange(10) > 0)).astype(np.float32), SEGMENTS)
  router = RouterConfig(load_balance=0.5, router_z_loss=0.25)

  @jax.jit
  def summed(params):
    plain = next_token(model)(params, None, batch, jnp.int32(0))
    whole = next_token(model, router=router)(params, None, batch, jnp.int32(0))
    return whole[2]["load_balance"], (plain, whole)

  value_and_grad = jax.jit(jax.value_and_grad(summed, has_aux=True))
  (balance, ((plain, weight), (total, again, told))), slope = value_and_grad(params)
  assert weight == again
  assert float(total) == pytest.approx(float(plain + 0.5 * balance + 0.25 * told["router_z"]), rel=1e-6)
  assert told["expert_tokens"].shape == (2, 4)
  assert balance / weight > 2  # which is the least
  # Its gradient alone moves the router towards equal shares.
  moved = jax.tree.map(lambda leaf, by: leaf - 1e-3 * by, params, slope)
  assert value_and_grad(moved)[0][0] < balance


def test_load_over_equal_shares():
  values = of_routers({"expert_tokens": np.array([[6.0, 2.0], [4.0, 4.0]]), "load_balance": np.float32(2.5)})
  assert values == {"load_balance": 2.5, "expert_load_max": 1.5, "expert_load_min": 0.5}


def test_a_run_from_scratch(tmp_path):
  """It tells losses and loads, and ends as a Mixtral that opens."""
  shape = dataclasses.replace(SHAPE, family="mixtral", num_layers=1, experts=EXPERTS)
  made = config(
    tmp_path / "run",
    shape=shape,
    plan=None,
    batch_size=16,
    steps=3,
    accumulate=2,
    log=LogConfig(log_every=1, tensorboard=False),
  )
  outcome = train(made)
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  for line in lines[:3]:
    assert 1 <= line["expert_load_max"] <= 2
    assert 0 <= line["expert_load_min"] <= 1
    assert line["load_balance"] > 1.9
  model, params = sa_jax.from_pretrained(outcome.model)
  assert model.config.experts == EXPERTS
  assert params["runs"]["0"]["anchor"]["mlp"]["experts"]["gate_proj"]["kernel"].shape[1] == 4


def test_what_only_mixtures_have_is_refused_of_others(tmp_path):
  with pytest.raises(sa_jax.UserError, match="a mixture of experts, and this model is not one"):
    train(config(tmp_path / "run", router=RouterConfig(load_balance=0.1)))
  with pytest.raises(sa_jax.UserError, match=r"load_balance=-1 \(must be 0 or more\)"):
    RouterConfig(load_balance=-1)
