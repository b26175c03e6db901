"""What the backward pass keeps under full rematerialisation, in bytes of the compiled program."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import Transformer
from sa_jax.sharding import abstract_params
from tests import tiny

LENGTH = 256


def temporaries(model: Transformer) -> int:
  def loss(params, tokens):
    return model.apply({"params": params}, tokens, method=model.hidden).sum()

  params, tokens = abstract_params(model), jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


small = functools.partial(tiny.model, max_length=LENGTH, mlp_dim=512, remat="full")


def test_followers_are_recomputed_one_by_one():
  block = LENGTH * 3 * small().config.mlp_dim * 4
  dense = temporaries(small("dense", num_layers=9, attention="blockwise"))
  shared = temporaries(small("0:1-8", num_layers=9, attention="blockwise"))
  # Recomputing the whole group would take the activations of its eight followers at once.
  assert shared <= dense + 4 * block


def test_an_unrolled_loop_and_its_remainder_are_the_loop():
  """Five followers, four in an iteration under ``dots``: the gradient is that without recomputation."""
  model = tiny.model("0:1-5", num_layers=6)
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(model, "runs")), tiny.tokens(1, 9)

  def gradient(remat):
    model = tiny.model("0:1-5", num_layers=6, remat=remat)
    return jax.jit(jax.grad(lambda params: jnp.square(model.apply({"params": params}, tokens)).mean()))(params)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, gradient("dots"), gradient("none"))


@pytest.mark.parametrize("state", ["query_key", "attention_weights"])
def test_of_each_block_its_input_is_kept_and_of_no_group_the_state(state):
  plan = lambda groups: ",".join(f"{2 * group}:{2 * group + 1}" for group in range(groups))
  few, many = (temporaries(small(plan(n), num_layers=2 * n, attention_state=state)) for n in (4, 8))
  block_input = LENGTH * small().config.embed_dim * 4
  assert many - few == 4 * 2 * block_input


def exponentials_of(equation) -> int:
  """How many it has, loops counted once: two in blockwise attention's forward pass, one in its backward pass."""
  inner = (each for jaxpr in jax.extend.core.jaxprs_in_params(equation.params) for each in jaxpr.eqns)
  return (equation.primitive.name == "exp") + sum(map(exponentials_of, inner))


@pytest.mark.parametrize(("plan", "kept"), [("dense", "attention"), ("0:1-3", "attention"), ("dense", "dots")])
def test_attention_is_kept_on_request(plan, kept):
  """Not computed again, at the price of its output and each query's log of sums a layer; gradients are the same."""
  models = {remat: tiny.model(plan, num_layers=4, attention="blockwise", remat=remat) for remat in ("full", kept)}
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(models["full"], "runs")), tiny.tokens(1, LENGTH)

  def gradient(model):
    return jax.grad(lambda params: jnp.square(model.apply({"params": params}, tokens)).mean())

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, *(jax.jit(gradient(model))(params) for model in models.values()))
  # The backward pass is the last loop of the program; it has one exponential in a block, an anchor's or a follower's.
  blocks = 1 if plan == "dense" else 2
  loops = lambda model: [each for each in jax.make_jaxpr(gradient(model))(params).jaxpr.eqns if exponentials_of(each)]
  assert exponentials_of(loops(models[kept])[-1]) == blocks
  assert exponentials_of(loops(models["full"])[-1]) == 3 * blocks


def test_what_keeping_attention_costs():
  full, kept = (
    temporaries(small("dense", num_layers=9, attention="blockwise", remat=how)) for how in ("full", "attention")
  )
  config = small().config
  of_a_layer = LENGTH * config.num_heads * (config.head_dim + 1) * 4
  assert 0.9 * 9 * of_a_layer <= kept - full <= 1.2 * 9 * of_a_layer
