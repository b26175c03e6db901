"""A model whose layers are mixtures of experts, on every way that other models go."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.analysis import look
from sa_jax.nn import ROUTER_SCORES, PlanArrays, PlannedTransformer
from sa_jax.nn.experts import Moe
from sa_jax.train import LoraConfig, abstract_adapters, attach, merge
from tests import tiny

EXPERTS = ops.Experts(4, 2, shared_width=24, shared_gate=True)
TOKENS = tiny.tokens(2, 12)


@pytest.fixture(scope="module")
def opened():
  """Three layers: two groups, one with a follower."""
  model = tiny.model("1:2", num_layers=3, experts=EXPERTS)
  return model, tiny.params(model)


def logits(model, params, *args, **how):
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, **how))(params, TOKENS, *args)


@pytest.fixture(scope="module")
def expected(opened):
  return np.asarray(logits(*opened))


def test_both_layouts_agree(opened, expected):
  model, params = opened
  runs = sa_jax.stack(params, model.plan)
  np.testing.assert_allclose(logits(model, runs), expected, atol=1e-5)
  tiny.assert_trees_equal(sa_jax.unstack(runs, model.plan), params)


def test_packed_rows_are_documents_by_themselves(opened, expected):
  model, params = opened
  packed = TOKENS.reshape(1, -1)
  segments = np.repeat([[1, 2]], 12, axis=1).astype(np.int32)
  found = jax.jit(lambda params: model.apply({"params": params}, packed, segments=segments))(params)
  np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_cached_steps_agree_with_whole_rows(opened, expected, cache_dtype):
  model, params = opened
  model = model.clone(config=dataclasses.replace(model.config, cache_dtype=cache_dtype))
  lengths = jnp.full(2, 8, jnp.int32)
  method = sa_jax.Transformer
  _, cache = jax.jit(lambda params: model.apply({"params": params}, TOKENS[:, :8], lengths, method=method.prefill))(
    params
  )
  cache = cache.grow(12)
  step = jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method.step))
  for position in range(8, 12):
    found, cache = step(params, jnp.asarray(TOKENS[:, position]), cache, jnp.full(2, position, jnp.int32))
    np.testing.assert_allclose(found, expected[:, position], atol=1e-5 if cache_dtype is None else 0.1)


def test_gradients_are_the_same_under_every_remat():
  model = tiny.model("dense", num_layers=1, experts=EXPERTS)
  runs = tiny.params(model, layout="runs")

  def gradients(remat):
    made = model.clone(config=dataclasses.replace(model.config, remat=remat))
    loss = lambda params: jnp.mean(jnp.sin(made.apply({"params": params}, TOKENS)))
    return jax.jit(jax.grad(loss))(runs)

  plain = gradients("none")
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
  for remat in ("full", "dots"):
    for found, wanted in zip(jax.tree.leaves(gradients(remat)), jax.tree.leaves(plain), strict=True):
      np.testing.assert_allclose(found, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_router_scores_are_kept_for_those_who_ask(opened):
  model, params = opened
  runs = sa_jax.stack(params, model.plan)
  apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS, mutable=[ROUTER_SCORES]))
  _, kept = apply(runs)
  shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
  assert sorted(shapes) == [(1, 1, 2, 12, 4), (1, 2, 12, 4), (1, 2, 12, 4)]


def test_the_plan_as_data(opened, expected):
  model, _ = opened
  dense = tiny.model("dense", num_layers=3, experts=EXPERTS)
  params = tiny.params(dense)
  pruned = sa_jax.prune(params, model.plan)
  planned = PlannedTransformer(model.config)
  arrays = PlanArrays.of(model.plan, model.config)
  found = jax.jit(lambda params: planned.apply({"params": params}, TOKENS, arrays))(sa_jax.stack(params, dense.plan))
  np.testing.assert_allclose(found, logits(model, pruned), atol=1e-5)


def test_adapters_of_experts_merge(opened):
  model, params = opened
  config = LoraConfig(rank=2)
  rng = np.random.default_rng(0)
  shapes = abstract_adapters(model, config, layout="layers")
  adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.05, shapes)
  assert adapters["layers"]["2"]["mlp"]["experts"]["down_proj"]["lora_a"].shape == (4, 48, 2)
  merged = merge(params, adapters, config)
  found = logits(model, attach(params, adapters, config))
  np.testing.assert_allclose(found, logits(model, merged), atol=2e-4)
  assert np.abs(np.asarray(found) - np.asarray(logits(model, params))).max() > 0.1


@pytest.mark.parametrize("kind", [{}, {"mlp_bias": True, "mlp_clamp": 7.0, "activation": "quick_gelu"}])
def test_a_step_gathers_the_chosen_experts_and_reads_no_other(kind):
  """In the compiled text nothing but a gather reads an array of all experts."""
  moe = Moe(tiny.config(experts=ops.Experts(16, 2), **kind))
  x = jnp.ones((1, 1, 32))
  params = nn.unbox(jax.eval_shape(moe.init, jax.random.key(0), x))
  text = jax.jit(lambda params, x: moe.apply(params, x, method=Moe.step)).lower(params, x).compile().as_text()
  whole = re.findall(r"(%[\w.]+) = f32\[16,(?:32,48|48,32|48|32)\]\S* (\S+)\(", text)
  assert {operation for _, operation in whole} == {"parameter"}
  readers = [line for line in text.splitlines() if any(f"{name}," in line or f"{name})" in line for name, _ in whole)]
  read = [re.search(r" = \S+ ([\w-]+)\(", line)[1] for line in readers]
  assert set(read) == {"fusion", "gather"}
  assert read.count("gather") == (6 if kind else 3)


def test_look_sees_what_the_experts_add(opened):
  model, params = opened
  seen = look(model, params, TOKENS, capture=("mlp", "attention", "residual")).seen
  for layer in range(3):
    added = seen["residual"][layer] + seen["attention"][layer] + seen["mlp"][layer]
    np.testing.assert_allclose(added, seen["residual"][layer + 1], atol=1e-4)


def test_what_experts_cannot_be():
  with pytest.raises(sa_jax.UserError, match="experts need 'gated'"):
    tiny.config(experts=EXPERTS, mlp="plain")
  with pytest.raises(sa_jax.UserError, match=r"experts.chosen=5 \(must be 1 to count=4\)"):
    tiny.config(experts=ops.Experts(4, 5))
