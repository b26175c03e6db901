"""Layers of two kinds: scanned = unrolled, gradients, the program's size, and plans that mix them."""

import dataclasses

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import ModelConfig, SharingPlan, Transformer, unstack

CONFIG = ModelConfig(
  vocab_size=31, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, qk_norm="head",
  window=3, local_layers=(0, 1, 3), local_rope=sa_jax.ops.RopeConfig(theta=100.0), attention_softcap=5.0,
  post_norms=True, norm_about_one=True, activation="gelu_tanh", embedding_scale=4.0, logits_softcap=9.0,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 11)).astype(np.int32)
LENGTHS = np.array([11, 6], np.int32)


def made(plan, **changes):
  model = Transformer(dataclasses.replace(CONFIG, **changes), SharingPlan.parse(plan, 4))
  return model, jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


def unboxed(params):
  import flax.linen as nn

  return nn.unbox(params)


@pytest.mark.slow
@pytest.mark.parametrize(("state", "remat"), [("query_key", "full"), ("attention_weights", "none")])
def test_scan_equals_unrolled(state, remat):
  model, params = made("0:1", attention_state=state, remat=remat)
  params = unboxed(params)
  # Run 1 holds layers 2 and 3: global, local.
  assert [run.layers for run in model.plan.runs] == [range(2), range(2, 4)]

  def loss(params):
    return (model.apply({"params": params}, TOKENS, LENGTHS)[0] ** 2).mean()

  scanned, grads = jax.jit(jax.value_and_grad(loss))(params)
  unrolled, expected = jax.jit(jax.value_and_grad(loss))(unstack(params, model.plan))
  np.testing.assert_allclose(scanned, unrolled, rtol=1e-5)
  flat = jax.tree.leaves(unstack(grads, model.plan))
  for found, wanted in zip(flat, jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def test_program_does_not_grow_with_depth():
  sizes = []
  for layers in (6, 48):
    config = dataclasses.replace(CONFIG, num_layers=layers, local_layers=tuple(i for i in range(layers) if i % 3 < 2))
    model = Transformer(config, SharingPlan.dense(layers))
    shapes = unboxed(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    sizes.append(len(jax.jit(model.apply).lower(shapes, TOKENS).as_text()))
  assert sizes[1] < 1.02 * sizes[0]


def test_mixed_group_is_refused():
  with pytest.raises(ValueError, match=r"local layers are \[0, 1, 3\].*\s2 \(global\) follows 1 \(local, 3 tokens\)"):
    made("1:2")
  made("0:1")
