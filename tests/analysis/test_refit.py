"""Refit against least squares in NumPy, and its promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import align, ridge, walk
from sa_jax.analysis.refit import Refit, refit
from sa_jax.config import ModelConfig
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=47, embed_dim=24, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32, eos_token_ids=()
)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(5))
PLAN = sa_jax.SharingPlan.parse("0:1,2:3-4", 5).with_head_maps({4: (1, 1, 3, 0)})
TOKENS = np.random.default_rng(0).integers(0, 47, (16, 16), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


def test_ridge_against_numpy():
  rng = np.random.default_rng(1)
  x, y, prior = rng.standard_normal((200, 12)), rng.standard_normal((200, 5)), rng.standard_normal((12, 5))
  sums = ridge.total(ridge.Sums.of(jnp.float32(x[i : i + 50]), jnp.float32(y[i : i + 50])) for i in range(0, 200, 50))
  penalty = 0.03 * np.trace(x.T @ x) / 12
  stacked = np.concatenate([x, np.sqrt(penalty) * np.eye(12)])
  want = np.linalg.lstsq(stacked, np.concatenate([y, np.sqrt(penalty) * prior]), rcond=None)[0]
  got, condition = ridge.solve(sums, jnp.float32(prior), 0.03)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert 0 < condition <= 1
  np.testing.assert_allclose(sums.error(got), np.sum((y - x @ want) ** 2), rtol=1e-5)
  lowered = np.sum((y - x @ prior) ** 2) - (np.sum((y - x @ want) ** 2) + penalty * np.sum((want - prior) ** 2))
  np.testing.assert_allclose(ridge.gain(sums, jnp.float32(prior), 0.03), lowered, rtol=1e-5)


def test_follower_against_numpy(params):
  """The first follower's W_O is the least-squares solution from its head outputs to the dense attention's output."""
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  result = refit(DENSE, params, plan, TOKENS, Refit(), chunk=16)
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TOKENS, 16))
  states = DENSE.apply({"params": params}, TOKENS, method="states")
  block = params["layers"]["1"]
  x = np.asarray(trace[0][0].x, np.float64)
  normed = (
    x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * np.asarray(block["attention_norm"]["scale"])
  )
  values = np.repeat(np.einsum("BTD,DKH->BTKH", normed, block["attention"]["v_proj"]["kernel"]), 2, axis=2)
  heads = np.einsum("BNTS,BSNH->BTNH", np.asarray(states[0].weights(), np.float64), values).reshape(-1, 24)
  y, prior = np.asarray(trace[1][0].y, np.float64).reshape(-1, 24), block["attention"]["o_proj"]["kernel"]
  prior = np.asarray(prior, np.float64).reshape(24, 24)
  gram = heads.T @ heads
  penalty = 0.01 * np.trace(gram) / 24 * np.eye(24)
  want = np.linalg.solve(gram + penalty, heads.T @ y + penalty @ prior)
  got = result.params["layers"]["1"]["attention"]["o_proj"]["kernel"].reshape(24, 24)
  np.testing.assert_allclose(got, want, atol=1e-5)
  (report,) = result.reports
  assert report.before == pytest.approx(np.sum((y - heads @ prior) ** 2) / np.sum(y**2), rel=1e-4)
  assert report.after == pytest.approx(np.sum((y - heads @ want) ** 2) / np.sum(y**2), rel=1e-4)


@pytest.mark.parametrize("how", [Refit(), Refit(values=4, maps=True, mlp=True)])
def test_streaming_equals_one_batch_and_never_raises_the_error(params, how):
  whole, parts = (refit(DENSE, params, PLAN, TOKENS, how, chunk=chunk) for chunk in (16, 5))
  assert whole.model.plan == parts.model.plan
  for mine, theirs in zip(whole.reports, parts.reports, strict=True):
    np.testing.assert_allclose(mine[2:4], theirs[2:4], rtol=1e-4)
    assert mine.after <= mine.before
  one, other = (made.model.apply({"params": made.params}, TOKENS[:2]) for made in (whole, parts))
  np.testing.assert_allclose(one, other, atol=2e-4)
  assert [(report.layer, report.part) for report in whole.reports if report.part == "attention"] == [
    (layer, "attention") for layer in (1, 3, 4)
  ]


def test_each_ingredient_lowers_the_error_further(params):
  """Values after W_O, and a map chosen by error, each leave a smaller error in the first follower."""
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  after = [
    refit(DENSE, params, plan, TOKENS, how, chunk=16).reports[0].after
    for how in (Refit(), Refit(values=8), Refit(maps=True))
  ]
  assert after[1] < 0.9 * after[0]
  assert after[2] < after[0]


def test_the_refitted_model_is_nearer_to_the_dense_one(params):
  plain, pruned = align.shared_model(CONFIG, params, PLAN)
  text = np.random.default_rng(4).integers(0, 47, (96, 16), np.int32)
  result = refit(DENSE, params, PLAN, text, chunk=96)
  other = np.random.default_rng(5).integers(0, 47, (8, 16), np.int32)
  want = np.asarray(DENSE.apply({"params": params}, other))
  distance = lambda model, params: np.mean((np.asarray(model.apply({"params": params}, other)) - want) ** 2)
  assert distance(result.model, result.params) < 0.8 * distance(plain, pruned)


def test_map_by_refit_is_the_best_of_its_neighbours(params):
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TOKENS, 16))
  fitted = [(walk.Chunk(trace[0][0].x, trace[0][0].state), trace[1][0])]
  block = params["layers"]["1"]
  found = align.map_by_refit(CONFIG, block, fitted, None, 0.01, sweeps=4)

  def error(head_map):
    plan = sa_jax.SharingPlan.parse("0:1", 5).with_head_maps({1: head_map})
    return refit(DENSE, params, plan, TOKENS, Refit(), chunk=16).reports[0].after

  best = error(found)
  assert best < error((0, 1, 2, 3))
  for head in range(4):
    changed = (*found[:head], (found[head] + 1) % 4, *found[head + 1 :])
    assert best < error(changed) + 1e-3


def test_undetermined_weights_are_refused(params):
  with pytest.raises(ValueError, match=r"layer 1 attention.*more text or a greater ridge"):
    refit(DENSE, params, PLAN, TOKENS[:1, :3], Refit(ridge=1e-12))
  with pytest.raises(ValueError, match="positive"):
    Refit(ridge=0.0)


def test_other_families(params):
  """Biases, two kinds of layers, norms after attention: a follower refitted onto itself is left as it is."""
  config = dataclasses.replace(
    CONFIG, window=4, local_layers=(0, 1), qkv_bias=True, output_bias=True, post_norms=True, attention_softcap=5.0
  )
  dense = sa_jax.Transformer(config, DENSE.plan)
  made = tiny.params(dense)
  first, second = made["layers"]["0"], made["layers"]["1"]
  # Layer 0 adds nothing, so layer 1 with its queries and keys attends as it does.
  silent = {name: {"scale": 0 * first[name]["scale"]} for name in ("attention_post_norm", "mlp_post_norm")}
  alike = {name: first["attention"][name] for name in ("q_proj", "k_proj")}
  second = second | {"attention": second["attention"] | alike, "attention_norm": first["attention_norm"]}
  made = made | {"layers": made["layers"] | {"0": first | silent, "1": second}}
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  result = refit(dense, made, plan, TOKENS, Refit(values=2), chunk=16)
  assert result.reports[0].before < 1e-5
  got = jax.jit(result.model.apply)({"params": result.params}, TOKENS)
  np.testing.assert_allclose(got, jax.jit(dense.apply)({"params": made}, TOKENS), atol=1e-4)
  with pytest.raises(ValueError, match="normalised at their output"):
    refit(dense, made, plan, TOKENS, Refit(mlp=True))
  with pytest.raises(ValueError, match="different keys"):
    refit(dense, made, sa_jax.SharingPlan.parse("1:2", 5), TOKENS)


def test_head_maps_by_refit_error_need_few_heads():
  for name, fits in (("smollm2-135m", True), ("llama-3-8b", False), ("llama-2-7b", False)):
    config = ModelConfig.preset(name)
    assert align.can_map_by_refit(config) is fits
    if not fits:
      with pytest.raises(ValueError, match="too many features to choose head maps by refit error: choose"):
        Refit(maps=True).check(config)
