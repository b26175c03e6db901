"""Our blocks in other people's programs: derivatives of any order, nnx, other anchors and other MLPs, other masks."""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sa_jax
from sa_jax import nn, ops
from sa_jax.analysis.refit import refit
from sa_jax.decode import generate
from sa_jax.sharding import make_mesh, on_mesh
from tests import tiny

PLAN = "0:1-2"


@pytest.fixture(scope="module")
def model():
  return tiny.model(PLAN, num_layers=3, attention="reference")


@pytest.fixture(scope="module")
def params(model):
  return jax.tree.map(jnp.asarray, tiny.params(model, "runs"))


def test_init_makes_parameters_and_nothing_else(model):
  assert set(jax.eval_shape(model.init, jax.random.key(0), tiny.tokens(1, 4))) == {"params"}


@pytest.mark.slow
def test_forward_mode_is_the_slope(model, params):
  """Directional derivatives against differences, and a Hessian-vector product against differences of gradients."""
  tokens = tiny.tokens(2, 6)
  loss = lambda params: jnp.square(model.apply({"params": params}, tokens)).mean()
  direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params)
  moved = lambda step: jax.tree.map(lambda x, d: x + step * d, params, direction)
  step = 1e-3
  slope = jax.jit(lambda: jax.jvp(loss, (params,), (direction,))[1])()
  difference = (jax.jit(loss)(moved(step)) - jax.jit(loss)(moved(-step))) / (2 * step)
  np.testing.assert_allclose(slope, difference, rtol=2e-3)
  gradient = jax.jit(jax.grad(loss))
  np.testing.assert_allclose(
    slope, jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradient(params), direction)), rtol=1e-4
  )
  product = jax.jit(lambda: jax.jvp(jax.grad(loss), (params,), (direction,))[1])()
  curved = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(moved(step)), gradient(moved(-step)))
  for ours, theirs in zip(jax.tree.leaves(product), jax.tree.leaves(curved), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.01 * np.abs(theirs).max())


@pytest.mark.slow
def test_vmap_over_models_and_gradients_of_each_example(model, params):
  tokens = tiny.tokens(3, 5)
  two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  apply = lambda params, tokens: model.apply({"params": params}, tokens)
  both = jax.jit(jax.vmap(apply, in_axes=(0, None)))(two, tokens)
  np.testing.assert_allclose(both[1], jax.jit(apply)(jax.tree.map(lambda x: x[1], two), tokens), atol=1e-5)
  loss = lambda params, row: apply(params, row[None])[0].sum()
  each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, tokens)
  whole = jax.jit(jax.grad(lambda params: apply(params, tokens).sum()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=2e-4), each, whole)


def test_parameters_in_the_wrong_layout_are_told_of(model, params):
  with pytest.raises(sa_jax.UserError, match=r"sa_jax.unstack\(params, model.plan\)"):
    model.apply({"params": params}, tiny.tokens(1, 4), np.array([4], np.int32), method=model.prefill)


@pytest.mark.slow
class TestNnx:
  def test_bridge(self, model, params):
    tokens = tiny.tokens(2, 5)
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), tokens)
    nnx.update(bridged, jax.tree.map(nnx.Param, params))
    np.testing.assert_allclose(bridged(tokens), model.apply({"params": params}, tokens), atol=1e-5)

  def test_bridge_on_a_mesh(self):
    model = tiny.model(PLAN, num_layers=3, vocab_size=64)
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    with on_mesh(mesh):
      bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), tiny.tokens(2, 5))
    assert bridged.embed["embedding"].get_value().sharding.spec[0] == "tensor"


# ALiBi (Press et al., arXiv 2108.12409): no rotary embedding, and a bias that falls with the distance, head by head.


class AlibiAttention(nn.AnchorAttention):
  def prefill(self, x, rows, kind):
    return super().prefill(x, dataclasses.replace(rows, bias=alibi(self.config, rows, x.shape[1], x.shape[1])), kind)

  def extend(self, x, cache, rows, kind=0, followed=True):
    bias = alibi(self.config, rows, x.shape[1], cache.values.shape[2])
    return super().extend(x, cache, dataclasses.replace(rows, bias=bias), kind, followed)


def alibi(config, rows, queries, keys):
  slots = jnp.atleast_2d(rows.positions(queries))
  distance = slots[:, None, :, None] - jnp.arange(keys)[None, None, None, :]
  slopes = 2.0 ** (-8 * jnp.arange(1, config.num_heads + 1) / config.num_heads)
  return -slopes[None, :, None, None] * distance.astype(jnp.float32)


class SquaredRelu(nn.Mlp):
  def hidden(self, x):
    return jnp.square(jax.nn.relu(self.up_proj(x)))

  def step(self, x):
    return self(x)


class AlibiBlock(nn.AnchorBlock):
  attention_type: ClassVar = AlibiAttention
  mlp_type: ClassVar = SquaredRelu


class PlainFollower(nn.FollowerBlock):
  mlp_type: ClassVar = SquaredRelu


def composed():
  changes = {"rope": None, "num_layers": 3}
  return sa_jax.Transformer(
    tiny.config(**changes), sa_jax.SharingPlan.parse(PLAN, 3), nn.Blocks(AlibiBlock, PlainFollower)
  )


def test_an_anchor_with_alibi_by_the_formula():
  """The whole model in NumPy, followers with the anchor's weights included."""
  model = composed()
  config, tokens = model.config, tiny.tokens(2, 7)
  params = linen.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
  layers = jax.tree.map(lambda x: np.asarray(x, np.float64), sa_jax.unstack(params, model.plan))
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale
  x = layers["embed"]["embedding"][tokens]
  distance = np.arange(7)[:, None] - np.arange(7)[None]
  bias = -(2.0 ** (-8 * np.arange(1, 5) / 4))[:, None, None] * distance
  for number in range(3):
    layer = layers["layers"][str(number)]
    project = lambda name, h: np.einsum("BTD,DNH->BTNH", h, layer["attention"][name]["kernel"])
    h = norm(x, layer["attention_norm"]["scale"])
    if number == 0:
      q, k = project("q_proj", h), np.repeat(project("k_proj", h), 2, axis=2)
      scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(config.head_dim) + bias
      weights = np.where(distance >= 0, np.exp(scores - scores.max(-1, keepdims=True)), 0)
      weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("BNTS,BSNH->BTNH", weights, np.repeat(project("v_proj", h), 2, axis=2))
    x = x + np.einsum("BTNH,NHD->BTD", y, layer["attention"]["o_proj"]["kernel"])
    up = norm(x, layer["mlp_norm"]["scale"]) @ layer["mlp"]["up_proj"]["kernel"]
    x = x + np.maximum(up, 0) ** 2 @ layer["mlp"]["down_proj"]["kernel"]
  wanted = norm(x, layers["final_norm"]["scale"]) @ layers["lm_head"]["kernel"]
  np.testing.assert_allclose(model.apply({"params": params}, tokens), wanted, atol=2e-5)


def test_blocks_of_ones_own_are_used_or_refused(model, params, tmp_path):
  """A checkpoint and a walk know the config alone: another model would come back."""
  layers = sa_jax.unstack(params, model.plan)
  mine = model.clone(blocks=nn.Blocks(AlibiBlock, PlainFollower))
  tokens = tiny.tokens(1, 8)
  dense = mine.clone(plan=sa_jax.SharingPlan.dense(model.config.num_layers))
  for call in (
    lambda: sa_jax.save(tmp_path / "model", mine, layers),
    lambda: refit(dense, layers, model.plan, tokens),
    lambda: nn.GradualTransformer(mine.config, mine.plan, mine.blocks),
  ):
    with pytest.raises(sa_jax.UserError, match="AlibiBlock|PlainFollower"):
      call()
  flat = model.clone(blocks=nn.Blocks(AlibiBlock))
  seen = [sa_jax.analysis.layer_similarity(each, layers, tokens, top_k=2).entropy for each in (model, flat)]
  assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_it_generates_what_it_says_without_a_cache():
  model = composed()
  params = linen.unbox(jax.jit(model.init)(jax.random.key(1), tiny.tokens(1, 4)))["params"]
  prompt = tiny.tokens(2, 5)
  out = generate(model, params, prompt, max_new_tokens=4).tokens
  tokens = np.asarray(prompt)
  apply = jax.jit(functools.partial(model.apply, {"params": params}))
  for _ in range(4):
    tokens = np.concatenate([tokens, np.asarray(apply(tokens))[:, -1:].argmax(-1)], axis=1)
  np.testing.assert_array_equal(out, tokens[:, 5:])


def test_both_sides_and_a_mask(model, params):
  """A token that may not be seen changes nothing; one after a token does, where attention is not causal."""
  tokens = np.array(tiny.tokens(1, 6))
  other = tokens.copy()
  other[0, 4] = (other[0, 4] + 1) % model.config.vocab_size
  hidden = ops.Rows(
    mask=jnp.asarray(np.arange(6) != 4)[None, None, None] | jnp.eye(6, dtype=bool)[None, None], causal=False
  )
  logits = lambda tokens, rows: np.asarray(model.apply({"params": params}, tokens, rows=rows))
  keep = np.arange(6) != 4
  np.testing.assert_array_equal(logits(tokens, hidden)[:, keep], logits(other, hidden)[:, keep])
  seen = ops.Rows(causal=False)
  assert np.abs(logits(tokens, seen)[:, 0] - logits(other, seen)[:, 0]).max() > 1e-4
