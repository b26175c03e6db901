"""Mixtures of experts against the sum that they are by definition, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.nn.mlp import gated
from sa_jax.ops import grouped, linear
from tests import tiny

TOKENS, EXPERTS, CHOSEN, WIDTH, HIDDEN = 20, 6, 2, 16, 24


def swiglu(gate, up):
  return jax.nn.silu(gate) * up


def arrays(seed=0, tokens=TOKENS, scale=0.3):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
  shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
  weights = {name: {"kernel": draw(EXPERTS, *shape)} for name, shape in shapes.items()}
  return draw(tokens, WIDTH) / scale, draw(tokens, EXPERTS) / scale, weights


def expected(x, scores, weights, experts):
  """The definition, in float64."""
  x, scores = (np.asarray(each, np.float64) for each in (x, scores))
  gate, up, down = (np.asarray(weights[f"{name}_proj"]["kernel"], np.float64) for name in ("gate", "up", "down"))
  out = np.zeros_like(x)
  for token, row in enumerate(scores):
    chosen = np.argsort(-row)[: experts.chosen]
    shares = np.exp(row) / np.exp(row[chosen] if experts.normalised else row).sum()
    for expert in chosen:
      hidden = x[token] @ gate[expert]
      hidden = hidden / (1 + np.exp(-hidden)) * (x[token] @ up[expert])
      out[token] += shares[expert] * (hidden @ down[expert])
  return out


@functools.partial(jax.jit, static_argnames=("experts", "few"))
def compute(x, scores, weights, experts, few=False):
  routes = ops.route(scores, experts)
  if few:
    return ops.through_few(x, routes, weights, swiglu, kernels=False)
  return ops.through_experts(x, routes, weights, swiglu)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_sorted_and_gathered_are_the_sum_over_chosen_experts(tokens, normalised):
  x, scores, weights = arrays(tokens=tokens)
  experts = ops.Experts(EXPERTS, CHOSEN, normalised)
  wanted = expected(x, scores, weights, experts)
  for few in (False, True):
    np.testing.assert_allclose(compute(x, scores, weights, experts, few), wanted, atol=2e-6)


def test_what_an_expert_gives_a_token_that_did_not_choose_it_does_not_count():
  """Were it infinite, nought times it would be NaN."""
  x, scores, weights = arrays(tokens=2)
  experts = ops.Experts(EXPERTS, 1)
  scores = jnp.zeros_like(scores).at[0, 0].set(9.0).at[1, 1].set(9.0)
  weights["up_proj"]["kernel"] = weights["up_proj"]["kernel"].at[1].set(3e38)
  x = x.at[0].set(jnp.abs(x[0]) + 4.0)
  wanted = expected(x[:1], scores[:1], weights, experts)
  np.testing.assert_allclose(compute(x, scores, weights, experts, few=True)[:1], wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_dropped_where_all_tokens_choose_the_same():
  x, scores, weights = arrays()
  scores = scores.at[:, 3].add(100.0).at[:, 1].add(50.0)
  wanted = expected(x, scores, weights, ops.Experts(EXPERTS, CHOSEN))
  np.testing.assert_allclose(compute(x, scores, weights, ops.Experts(EXPERTS, CHOSEN)), wanted, atol=2e-6)


def test_parts_of_the_experts_add_up():
  x, scores, weights = arrays()
  routes = ops.route(scores, ops.Experts(EXPERTS, CHOSEN))

  @jax.jit
  def part(first):
    own = jax.tree.map(lambda kernel: jax.lax.dynamic_slice_in_dim(kernel, first, 2), weights)
    return ops.through_experts(x, routes, own, swiglu, first)

  together = sum(part(jnp.int32(first)) for first in (0, 2, 4))
  np.testing.assert_allclose(together, expected(x, scores, weights, ops.Experts(EXPERTS, CHOSEN)), atol=3e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_gradients(normalised):
  """Those of the same sum over all experts, where those that were not chosen have the weight 0."""
  x, scores, weights = arrays()
  experts = ops.Experts(EXPERTS, CHOSEN, normalised)

  def literal(x, scores, weights):
    shares = jax.nn.softmax(scores)
    smallest = jax.lax.top_k(scores, CHOSEN)[0][:, -1:]
    shares = jnp.where(scores >= smallest, shares, 0.0)
    shares = shares / shares.sum(axis=-1, keepdims=True) if normalised else shares
    gate, up, down = (weights[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(jnp.einsum("nd,xdf->nxf", x, gate)) * jnp.einsum("nd,xdf->nxf", x, up)
    return jnp.einsum("nxf,xfd,nx->nd", hidden, down, shares)

  of = lambda function: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=(0, 1, 2)))
  found = of(lambda *args: compute(*args, experts))(x, scores, weights)
  for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(of(literal)(x, scores, weights)), strict=True):
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_adapters_are_products_of_their_own():
  x, scores, weights = arrays()
  rng = np.random.default_rng(1)
  low = {
    name: [
      jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for shape in ((EXPERTS, rows, 3), (EXPERTS, 3, columns))
    ]
    for name, (rows, columns) in {name: weights[name]["kernel"].shape[1:] for name in weights}.items()
  }
  adapted = {name: {**weights[name], "lora_a": low[name][0], "lora_b": low[name][1]} for name in weights}
  merged = {name: {"kernel": weights[name]["kernel"] + low[name][0] @ low[name][1]} for name in weights}
  experts = ops.Experts(EXPERTS, CHOSEN)
  for few in (False, True):
    wanted = compute(x, scores, merged, experts, few)
    np.testing.assert_allclose(compute(x, scores, adapted, experts, few), wanted, atol=5e-6)


class TestOnTheDevice:
  """The kernels in half precision: compiled where there is a GPU, interpreted elsewhere."""

  interpret = jax.default_backend() == "cpu"

  @pytest.mark.parametrize("sizes", [(100, 0, 57, 90), (0, 0, 0, 256), (128, 127, 1, 0)])
  def test_grouped_products(self, sizes):
    """Groups that end inside a tile and on its border, empty ones, and rows that are in none; and the gradients."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((256, 128), (4, 128, 128)))
    sizes = jnp.asarray(sizes, jnp.int32)

    def of(product, dtype):
      loss = lambda x, weights: jnp.sum(jnp.sin(product(x, weights, sizes).astype(jnp.float32) * 0.1))
      args = x.astype(dtype), weights.astype(dtype)
      return jax.jit(lambda *args: (product(*args, sizes), *jax.grad(loss, argnums=(0, 1))(*args)))(*args)

    found = of(functools.partial(grouped.product_by_kernels, interpret=self.interpret), jnp.bfloat16)
    for ours, wanted in zip(found, of(jax.lax.ragged_dot, jnp.float32), strict=True):
      np.testing.assert_allclose(ours.astype(jnp.float32), wanted, atol=0.02 * float(jnp.abs(wanted).max()))

  @pytest.mark.parametrize(("tokens", "hidden", "clamp"), [(1, 256, None), (5, 64, 0.9)])
  def test_kernels_read_the_chosen_experts(self, tokens, hidden, clamp):
    """Experts that nobody chose are NaN, and one place is empty; those with a clamp have biases, too."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.bfloat16)
    shapes = [(64, hidden), (64, hidden), (hidden, 64)] + [(hidden,), (hidden,)] * (clamp is not None)
    gate, up, down, *biases = (draw(4, *shape).at[jnp.asarray([0, 2])].set(jnp.nan) for shape in shapes)
    x, places = draw(tokens, 64), jnp.asarray([1, 3, -1], jnp.int32)
    config = tiny.config() if clamp is None else tiny.config(activation="quick_gelu", mlp_clamp=clamp)
    found = linear.chosen_gated(x, (gate, up), biases, places, gated(config), interpret=self.interpret)
    np.testing.assert_array_equal(found[2].astype(jnp.float32), 0)
    outputs = linear.chosen_down(found, down, places, interpret=self.interpret)
    np.testing.assert_array_equal(outputs[2], 0)
    wide = lambda array: np.asarray(array.astype(jnp.float32), np.float64)
    for place, expert in enumerate((1, 3)):
      left, right = wide(x) @ wide(gate[expert]), wide(x) @ wide(up[expert])
      if clamp is None:
        wanted = left / (1 + np.exp(-left)) * right
      else:
        left, right = np.minimum(left + wide(biases[0][expert]), clamp), right + wide(biases[1][expert])
        wanted = left / (1 + np.exp(-1.702 * left)) * (1 + np.clip(right, -clamp, clamp))
      np.testing.assert_allclose(wide(found[place]), wanted, atol=0.005 * np.abs(wanted).max())
      outcome = wide(found[place]) @ wide(down[expert])
      np.testing.assert_allclose(outputs[place], outcome, atol=1e-3 * np.abs(outcome).max())


@pytest.mark.parametrize(
  ("values", "fault"),
  [
    ({"count": 0, "chosen": 1}, "count=0"),
    ({"count": 4, "chosen": 5}, "chosen=5"),
    ({"count": 4, "chosen": 2, "shared_width": -1}, "shared_width=-1"),
    ({"count": 4, "chosen": 2, "shared_gate": True}, "needs shared_width"),
  ],
)
def test_faults(values, fault):
  (found,) = ops.Experts(**values).faults()
  assert fault in found
