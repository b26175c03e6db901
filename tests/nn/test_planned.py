"""The plan as data: one compilation, any plan."""

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import nn, ops
from sa_jax.config import ModelConfig
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=53, embed_dim=24, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32, eos_token_ids=()
)
DENSE = sa_jax.SharingPlan.dense(6)
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 10), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(sa_jax.Transformer(CONFIG, DENSE), "runs"))


def random_plan(rng: np.random.Generator) -> sa_jax.SharingPlan:
  followers = [layer for layer in range(1, 6) if rng.random() < 0.5]
  plan = sa_jax.SharingPlan.from_followers(6, followers)
  return plan.with_head_maps({layer: rng.integers(0, 4, 4).tolist() for layer in followers if rng.random() < 0.5})


def test_parameters_are_the_dense_models():
  shapes = jax.eval_shape(
    lambda: nn.PlannedTransformer(CONFIG).init(jax.random.key(0), jnp.asarray(TOKENS), nn.PlanArrays.of(DENSE, CONFIG))
  )
  ours = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), flax.linen.unbox(shapes)["params"])
  theirs = jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), sa_jax.sharding.abstract_params(sa_jax.Transformer(CONFIG, DENSE))
  )
  assert ours == theirs


def test_a_hundred_plans_with_one_compilation(params):
  traces = 0

  @jax.jit
  def losses(params, tokens, plan):
    nonlocal traces
    traces += 1
    logits = nn.PlannedTransformer(CONFIG).apply({"params": params}, tokens, plan)
    return -ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).mean()

  rng = np.random.default_rng(2)
  plans = [random_plan(rng) for _ in range(100)]
  got = [float(losses(params, TOKENS, nn.PlanArrays.of(plan, CONFIG))) for plan in plans]
  assert traces == 1
  assert len(set(plans)) > 60
  layers = sa_jax.unstack(params, DENSE)
  for plan, loss in list(zip(plans, got))[::8]:
    # Not jitted: its operations are those of the plan before.
    logits = sa_jax.Transformer(CONFIG, plan).apply({"params": sa_jax.prune(layers, plan)}, TOKENS)
    want = -ops.token_log_likelihoods(logits[:, :-1], TOKENS[:, 1:]).mean()
    assert loss == pytest.approx(float(want), abs=1e-5)


def test_plans_can_be_vmapped(params):
  rng = np.random.default_rng(3)
  plans = [random_plan(rng) for _ in range(4)]
  apply = lambda plan: nn.PlannedTransformer(CONFIG).apply({"params": params}, TOKENS, plan)
  together = jax.jit(jax.vmap(apply))(nn.PlanArrays.stack(plans, CONFIG))
  alone = jax.jit(apply)
  for plan, logits in zip(plans, together):
    np.testing.assert_allclose(logits, alone(nn.PlanArrays.of(plan, CONFIG)), atol=1e-5)


LAYER_NORM = {"norm": "layer", "norm_bias": True, "mlp": "plain", "parallel": True, "activation": "gelu"}
FURTHER = {
  "gemma": {
    "qk_norm": "head", "qkv_bias": True, "mlp_bias": True, "post_norms": True, "norm_about_one": True,
    "embedding_scale": 4.0, "attention_softcap": 5.0, "logits_softcap": 3.0, "tie_embeddings": True,
  },
  "olmo": {"qk_norm": "heads", "post_norms": True, "pre_norms": False, "residual_scale": 0.3, "logits_scale": 0.5,
    "sinks": True,
  },
  "phi": LAYER_NORM | {"shared_norm": True, "head_bias": True, "mlp_bias": True, "qk_norm": "head"},
  "neox": LAYER_NORM | {"norm_about_one": True, "qk_norm": "head", "norm_rotated": True, "residual_scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("changes", FURTHER.values(), ids=FURTHER)
def test_layers_of_two_kinds_and_everything_else_that_families_add(changes):
  config = dataclasses.replace(CONFIG, window=4, local_layers=(0, 1, 3), **changes)
  plan = sa_jax.SharingPlan.parse("0:1,4:5", 6).with_head_maps({5: (1, 1, 3, 0)})
  dense = tiny.params(sa_jax.Transformer(config, DENSE))
  apply = lambda params, plan: nn.PlannedTransformer(config).apply({"params": params}, TOKENS, plan)
  got = jax.jit(apply)(sa_jax.stack(dense, DENSE), nn.PlanArrays.of(plan, config))
  want = jax.jit(sa_jax.Transformer(config, plan).apply)({"params": sa_jax.prune(dense, plan)}, TOKENS)
  np.testing.assert_allclose(got, want, atol=1e-5)
  with pytest.raises(ValueError, match="different keys"):
    nn.PlanArrays.of(sa_jax.SharingPlan.parse("1:2", 6), config)
