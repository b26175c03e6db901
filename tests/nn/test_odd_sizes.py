"""Sizes that a mesh does not divide, on 8 virtual devices: what is whole then, and that all numbers are the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import UserError, ops
from sa_jax.nn.split import attend
from sa_jax.sharding import cache_shardings, make_mesh, named_sharding, on_mesh, param_shardings, rules_of
from sa_jax.train import Batch, OptimizerConfig, make_optimizer, make_state, make_step, next_token, state_shardings
from tests import tiny


@functools.cache
def model(**changes):
  """61 tokens, and keys for two devices, or of nine heads for three."""
  return tiny.model("0:1", num_layers=2, attention="blockwise", **({"num_heads": 8} | changes))


def placed(made, mesh, layout):
  """The parameters, and where they are on the mesh."""
  params = jax.tree.map(jnp.asarray, tiny.params(made, layout))
  return params, jax.device_put(params, param_shardings(made, mesh, layout=layout))


MESHES = {
  "2x4": ({"fsdp": 2, "tensor": 4}, {}),
  "nine heads": ({"data": 2, "tensor": 4}, {"num_heads": 9, "num_kv_heads": 3}),
}
over_meshes = pytest.mark.parametrize(("sizes", "changes"), MESHES.values(), ids=MESHES)


@pytest.mark.parametrize("heads", [(8, 2), (12, 3), (12, 6), (12, 2), (9, 3)], ids=str)
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"tensor": 4, "sequence": 2}], ids=["rows", "tokens"])
def test_attention_and_its_gradient(heads, sizes):
  """Each device has its own query heads, and of the keys, which all have, those that these need."""
  counts = (heads[0], heads[1], heads[1])
  q, k, v = (jax.random.normal(jax.random.key(number), (2, 16, count, 8)) for number, count in enumerate(counts))
  rows = ops.Rows(lengths=jnp.asarray([16, 11]))

  def value(q, k, v):
    out = attend(q, k, v, rows, ops.AttentionSpec(), "blockwise")
    out = jnp.where(jnp.arange(16)[None, :, None, None] < rows.lengths[:, None, None, None], out, 0)
    return jnp.sum(out**2), out

  both = lambda: jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))
  (_, expected), gradients = both()(q, k, v)
  with on_mesh(make_mesh(**sizes)):
    compiled = both().lower(q, k, v).compile()
  (_, found), found_gradients = compiled(q, k, v)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for one, other in zip(found_gradients, gradients, strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5)


@over_meshes
def test_perplexity(sizes, changes):
  made = model(**changes)
  alone, params = placed(made, make_mesh(**sizes), "runs")
  tokens = tiny.tokens(4, 16)
  expected = sa_jax.perplexity(made, alone, tokens, batch_size=4)
  assert sa_jax.perplexity(made, params, tokens, batch_size=4).loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("length", [13, 16])
def test_perplexity_where_tokens_are_split(length):
  """Thirteen tokens over four devices: each attends in all of them."""
  made = model()
  alone, params = placed(made, make_mesh(tensor=2, sequence=4), "runs")
  expected = sa_jax.perplexity(made, alone, tiny.tokens(4, length), batch_size=4)
  assert sa_jax.perplexity(made, params, tiny.tokens(4, length), batch_size=4).loss == pytest.approx(expected.loss)


@over_meshes
def test_generate(sizes, changes):
  made = model(**changes)
  alone, params = placed(made, make_mesh(**sizes), "layers")
  found = [sa_jax.generate(made, each, tiny.tokens(4, 9), max_new_tokens=6).tokens for each in (alone, params)]
  np.testing.assert_array_equal(*found)


@pytest.mark.slow
@over_meshes
def test_a_train_step(sizes, changes, capfd):
  made, mesh = model(**changes), make_mesh(**sizes)
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
  batch = Batch(tiny.tokens(4, 16), np.ones((4, 16), np.float32))

  def stepped(shardings, place):
    params = jax.tree.map(jnp.asarray, tiny.params(made, "runs"))
    step = make_step(next_token(made), optimizer, shardings=shardings)
    return step(make_state(optimizer, params, shardings), None, jax.tree.map(place, batch))

  expected, metrics = stepped(None, jnp.asarray)
  shardings = state_shardings(optimizer, tiny.params(made, "runs"), param_shardings(made, mesh))
  rows = named_sharding(mesh, ("batch", "length"))
  state, found = stepped(shardings, functools.partial(jax.device_put, device=rows))
  assert "full rematerialization" not in capfd.readouterr().err
  np.testing.assert_allclose([found.loss, found.grad_norm], [metrics.loss, metrics.grad_norm], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, expected.params)


def test_what_is_whole_is_told_in_one_line(caplog):
  made, mesh = model(vocab_size=53), make_mesh(fsdp=2, tensor=4)
  for layout in ("runs", "layers"):
    shardings = param_shardings(made, mesh, layout=layout)
  (record,) = caplog.records
  assert record.message == (
    "not split over the mesh: vocab of 53 (tensor=4 does not divide it); kv_heads of 2 (tensor=4 does not divide it)"
  )
  attention = shardings["layers"]["0"]["attention"]
  assert tuple(shardings["embed"]["embedding"].spec) == (None, "fsdp")
  assert tuple(attention["k_proj"]["kernel"].spec) == ("fsdp", None, None)
  assert tuple(attention["q_proj"]["kernel"].spec) == ("fsdp", "tensor", None)
  assert {leaf.spec[1] for leaf in jax.tree.leaves(cache_shardings(made, mesh))} == {None}
  found = dict(rules_of(made.config, placed(made, mesh, "layers")[1], mesh))
  assert (found["heads"], found["kv_heads"], found["vocab"]) == ("tensor", None, "tensor")


def test_logits_are_split_all_the_same():
  """Where the head is whole, each device still multiplies with its part of it, padded: 8 of 61."""
  made, mesh = model(), make_mesh(tensor=8)
  params = placed(made, mesh, "layers")[1]
  with on_mesh(mesh):
    text = jax.jit(lambda params, x: made.apply({"params": params}, x)).lower(params, tiny.tokens(4, 16)).compile()
  assert re.search(r"= f32\[64,8\]\S* dot\(.*/lm_head/", text.as_text())


def test_a_mesh_axis_that_splits_nothing_is_refused():
  with pytest.raises(UserError, match=r"fsdp=7 \(it divides none of embed 32\)") as caught:
    param_shardings(model(), make_mesh(fsdp=7, devices=jax.devices()[:7]))
  assert "tensor" not in str(caught.value)
  with pytest.raises(UserError, match=r"tensor=7 \(it divides none of heads 8, kv_heads 2, mlp 48, vocab 61\)"):
    param_shardings(model(), make_mesh(tensor=7, devices=jax.devices()[:7]))
