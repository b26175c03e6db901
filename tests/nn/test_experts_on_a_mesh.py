"""Experts over the devices of a mesh: the same numbers, and only tokens travel between devices with other experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.hlo import collectives
from sa_jax.sharding import make_mesh, named_sharding, param_shardings
from tests import tiny

EXPERTS = ops.Experts(8, 2, shared_width=16)
TOKENS = tiny.tokens(8, 6)
GPT_OSS = {"sinks": True, "qkv_bias": True, "mlp_bias": True, "mlp_clamp": 0.5, "activation": "quick_gelu"}


@pytest.fixture(scope="module")
def opened():
  """With all that a mixture may have."""
  model = tiny.model("dense", num_layers=1, vocab_size=64, experts=EXPERTS, **GPT_OSS)
  return model, tiny.params(model, layout="runs")


def program(model):
  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens)
    return jnp.mean(jnp.sin(logits)), logits

  return jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def expected(opened):
  model, params = opened
  return program(model)(params, TOKENS)


@pytest.mark.parametrize(
  "sizes", [{"expert": 8}, {"fsdp": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str
)
def test_logits_and_gradients(opened, expected, sizes):
  model, params = opened
  mesh = make_mesh(**sizes)
  placed = jax.device_put(params, param_shardings(model, mesh))
  experts = placed["runs"]["0"]["anchor"]["mlp"]["experts"]["up_proj"]["kernel"]
  assert experts.addressable_shards[0].data.size * 8 == experts.size
  tokens = jax.device_put(TOKENS, named_sharding(mesh, ("batch", "length")))
  with sa_jax.sharding.on_mesh(mesh):
    found = program(model)(placed, tokens)
  for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * max(1.0, float(jnp.abs(wanted).max())))


def test_no_weights_of_experts_travel(opened):
  """Over `expert`, a mixture sends as many bytes of tokens as two exchanges of its input; its weights stay."""
  model, params = opened
  mesh = make_mesh(expert=8)
  placed = jax.device_put(params, param_shardings(model, mesh))
  tokens = jax.device_put(TOKENS, named_sharding(mesh, ("batch", "length")))
  with sa_jax.sharding.on_mesh(mesh):
    compiled = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)).lower(placed, tokens).compile()
  sent = {each.kind: each for each in collectives(compiled.as_text())}
  weights = EXPERTS.count * model.config.embed_dim * model.config.mlp_dim * 4
  assert sum(each.bytes for each in sent.values()) < weights
  assert "all-gather" in sent


def test_one_row_decodes_as_on_one_device(opened):
  """A row that does not divide over the devices: all of them have it, and each computes what its experts give."""
  model, params = opened
  layers = sa_jax.unstack(params, model.plan)
  mesh = make_mesh(expert=4, tensor=2)
  placed = jax.device_put(layers, param_shardings(model, mesh, layout="layers"))
  wanted = sa_jax.generate(model, layers, TOKENS[:1], max_new_tokens=4).tokens
  np.testing.assert_array_equal(sa_jax.generate(model, placed, TOKENS[:1], max_new_tokens=4).tokens, wanted)


def test_a_mesh_that_does_not_divide_the_experts(opened):
  model, _ = opened
  model = model.clone(config=dataclasses.replace(model.config, experts=ops.Experts(6, 2)))
  with pytest.raises(sa_jax.UserError, match="^6 experts do not divide over the mesh axis expert of 4 devices$"):
    param_shardings(model, make_mesh(data=2, expert=4))
