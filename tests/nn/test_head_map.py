"""Head maps: each head of a follower may use any head of its anchor, in every form of the model alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import nn
from sa_jax.config import ModelConfig
from sa_jax.formats import checkpoint, hf_plan
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=61, embed_dim=32, num_layers=5, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=48, eos_token_ids=()
)
PLAN = sa_jax.SharingPlan.parse("0:1-2,3:4", 5).with_head_maps({1: (3, 3, 0, 5, 1, 1), 4: (5, 4, 3, 2, 1, 0)})
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(sa_jax.Transformer(CONFIG, PLAN), "runs"))


def test_follower_uses_the_mapped_heads(params):
  layers = sa_jax.unstack(params, PLAN)
  block = layers["layers"]["1"]["attention"]
  state = sa_jax.Transformer(CONFIG, PLAN).apply({"params": layers}, TOKENS, method="states")[0]
  x = np.random.default_rng(1).standard_normal((2, 12, 32)).astype(np.float32)
  got = nn.FollowerAttention(CONFIG).apply({"params": block}, x, state.take_heads(jnp.array(PLAN.head_map_of(1))))
  weights = np.asarray(state.weights(), np.float64)
  want = np.zeros((2, 12, 32))
  for head, source in enumerate(PLAN.head_map_of(1)):
    values = x @ np.asarray(block["v_proj"]["kernel"])[:, head // 3]
    want += weights[:, source] @ values @ np.asarray(block["o_proj"]["kernel"])[head]
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.slow
def test_both_state_forms_and_both_layouts_agree(params):
  want = sa_jax.Transformer(CONFIG, PLAN).apply({"params": params}, TOKENS)
  weights = dataclasses.replace(CONFIG, attention_state="attention_weights")
  np.testing.assert_allclose(sa_jax.Transformer(weights, PLAN).apply({"params": params}, TOKENS), want, atol=5e-6)
  layers = sa_jax.unstack(params, PLAN)
  np.testing.assert_allclose(sa_jax.Transformer(CONFIG, PLAN).apply({"params": layers}, TOKENS), want, atol=5e-6)
  plain = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan(PLAN.source)).apply({"params": params}, TOKENS)
  assert np.abs(plain - want).max() > 1e-3


def test_states_are_what_each_layer_used(params):
  states = sa_jax.Transformer(CONFIG, PLAN).apply({"params": sa_jax.unstack(params, PLAN)}, TOKENS, method="states")
  weights = [np.asarray(state.weights()) for state in states]
  np.testing.assert_allclose(weights[1], weights[0][:, list(PLAN.head_map_of(1))], atol=1e-6)
  np.testing.assert_array_equal(weights[2], weights[0])


@pytest.mark.slow
def test_decoding_agrees_with_scoring(params):
  model = sa_jax.Transformer(CONFIG, PLAN)
  out = sa_jax.generate(model, params, TOKENS[:, :5], max_new_tokens=4)
  row = TOKENS[:, :5]
  for step in range(4):
    padded = np.pad(row, ((0, 0), (0, 9 - row.shape[1])))
    logits = model.apply({"params": params}, padded, lengths=np.full(2, row.shape[1], np.int32))
    row = np.concatenate([row, np.argmax(logits[:, row.shape[1] - 1], axis=-1).astype(np.int32)[:, None]], axis=1)
    np.testing.assert_array_equal(out.tokens[:, step], row[:, -1])


def test_plan_normalises_and_checks():
  identity = sa_jax.SharingPlan((0, 0, 0), (None, (0, 1, 2), (0, 1, 2)))
  assert identity == sa_jax.SharingPlan((0, 0, 0))
  assert identity.head_map is None
  assert hash(PLAN) != hash(sa_jax.SharingPlan(PLAN.source))
  assert str(PLAN) == "0:1-2,3:4"
  with pytest.raises(ValueError, match=r"layer 0 is an anchor.*\n  layer 1 uses heads \[4\]"):
    sa_jax.SharingPlan((0, 0), ((1, 0), (4, 0)))
  with pytest.raises(ValueError, match="give one per layer"):
    sa_jax.SharingPlan((0, 0), ((1, 0),))
  with pytest.raises(ValueError, match=r"layers \[1, 4\] do not have 3 entries"):
    sa_jax.Transformer(dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=3), PLAN)


def test_checkpoint_keeps_the_head_map(params, tmp_path):
  checkpoint.save_checkpoint(tmp_path / "shared", CONFIG, PLAN, sa_jax.unstack(params, PLAN))
  model, again = sa_jax.from_pretrained(tmp_path / "shared")
  assert model.plan == PLAN
  want = sa_jax.Transformer(CONFIG, PLAN).apply({"params": params}, TOKENS)
  np.testing.assert_array_equal(model.apply({"params": again}, TOKENS), want)


@pytest.mark.parametrize("head_map", ["x", [None, [0, "1"]], [None, 3]])
def test_malformed_head_map_on_disk_is_refused(head_map):
  with pytest.raises(ValueError, match="head_map must be a list"):
    hf_plan.read_plan({"shared_attention": {"source": [0, 0], "head_map": head_map}}, 2)
