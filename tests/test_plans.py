"""The plans of known models: found by shape and by a tensor, and what they say holds together."""

import json
from importlib import resources

import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import plans
from sa_jax.analysis.budget import Budget
from sa_jax.config import ModelConfig
from sa_jax.nn.transformer import check_plan
from tests import tiny

SMOLLM2 = ModelConfig.preset("smollm2-135m")
GEMMA = ModelConfig(
  vocab_size=262144, embed_dim=640, num_layers=18, num_heads=4, num_kv_heads=1, head_dim=256, mlp_dim=2048,
  tie_embeddings=True, post_norms=True, qk_norm="head", local_layers=(*range(5), *range(6, 11), *range(12, 17)),
  window=512,
)  # fmt: skip
DATA = [
  json.loads(file.read_text()) for file in resources.files("sa_jax.plans").iterdir() if file.name.endswith(".json")
]


def test_every_plan_is_one_and_says_what_it_cost():
  assert {each["model"] for each in DATA} == {"SmolLM2-135M-Instruct", "Gemma 3 270M"}
  for each in DATA:
    assert len(each["plans"]) >= 5
    layers = len(each["plans"][0]["shared_attention"]["source"])
    counts = [entry["followers"] for entry in each["plans"]]
    assert counts == sorted(set(counts))
    for entry in each["plans"]:
      plan = sa_jax.SharingPlan.parse(entry["plan"], layers)
      assert list(plan.source) == entry["shared_attention"]["source"]
      assert len(plan.followers) == entry["followers"]
      assert all(0.8 < value < 2 for value in entry["times_dense"].values())


def test_a_model_is_found_by_its_shape():
  found = plans.get(SMOLLM2, followers=8)
  assert str(found.plan) == "5:6-7,11:12,14:15,21:22,24:25,26:27-28"
  assert found.plan.head_map is not None
  assert found.model == "SmolLM2-135M-Instruct"
  check_plan(SMOLLM2, found.plan)
  assert len(plans.get(sa_jax.Transformer(SMOLLM2, sa_jax.SharingPlan.dense(30)), 16).plan.followers) == 16


@pytest.mark.parametrize("followers", [2, 3, 4, 6, 8, 10])
def test_every_budget_of_gemma_is_found_as_share_asks_for_it(followers):
  found = plans.get(GEMMA, Budget.parse(str(followers)).most(GEMMA))
  assert (found.model, len(found.plan.followers)) == ("Gemma 3 270M", followers)
  check_plan(GEMMA, found.plan)


def test_another_model_is_not():
  with pytest.raises(sa_jax.UserError, match="no plan with 7 followers is known for SmolLM2.* only with"):
    plans.get(SMOLLM2, 7)
  with pytest.raises(sa_jax.UserError, match="no plans are known for this model, only for Gemma 3 270M, SmolLM2"):
    plans.get(tiny.config(num_layers=1), 2)
  other = {"final_norm": {"scale": np.ones(576, np.float32)}}
  with pytest.raises(sa_jax.UserError, match="the shapes of SmolLM2-135M-Instruct, but different weights"):
    plans.get(SMOLLM2, 8, other)


def test_a_tensor_is_the_same_in_every_file_of_a_model():
  """What bfloat16 holds, however it was stored: Gemma's norms have 1 added in GGUF files."""
  scale = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.bfloat16).astype(jnp.float32))
  stored = (scale + 1) - 1
  one, other = ({"final_norm": {"scale": each}} for each in (scale.astype("bfloat16"), stored))
  assert plans.of_final_norm(one) == plans.of_final_norm(other)
  assert plans.of_final_norm({"final_norm": {"scale": scale * 1.1}}) != plans.of_final_norm(one)
