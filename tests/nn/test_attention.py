"""The building blocks: an anchor hands out its state, a follower uses it and has no queries and keys of its own."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from sa_jax import UserError, ops
from sa_jax.nn import AnchorAttention, AttentionWeights, FollowerAttention, LayerCache, QueryKey
from tests import tiny

STATES = ("query_key", "attention_weights")
X = np.random.default_rng(0).normal(size=(2, 7, 32)).astype(np.float32)
LENGTHS = np.array([4, 7], np.int32)


def config(state: str, **changes):
  # A named backend, so that the number of products does not depend on a choice.
  return tiny.config(attention_state=state, attention="reference", **changes)


def init(module, *args):
  """Random parameters of the shapes that the module declares."""
  rng = np.random.default_rng(1)
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
  return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@functools.cache
def anchor_and_follower(state: str):
  anchor, follower = AnchorAttention(config(state)), FollowerAttention(config(state))
  params = init(anchor, X)
  _, made = jax.eval_shape(anchor.apply, params, X)
  return anchor, params, follower, init(follower, X, made)


@pytest.mark.parametrize("state", STATES)
def test_follower_has_no_queries_and_keys(state):
  _, params, _, follower_params = anchor_and_follower(state)
  assert set(params["params"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
  assert set(follower_params["params"]) == {"v_proj", "o_proj"}
  # D 32, N 4, K 2, H 8.
  assert jax.tree.map(np.shape, follower_params["params"]) == {
    "v_proj": {"kernel": (32, 2, 8)},
    "o_proj": {"kernel": (4, 8, 32)},
  }


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_follower_equals_full_attention_given_the_same_state(state, lengths):
  """A follower with the anchor's V and O computes the anchor's output."""
  anchor, params, follower, _ = anchor_and_follower(state)
  y, made = jax.jit(anchor.apply)(params, X, ops.Rows(lengths))
  own = {"params": {name: params["params"][name] for name in ("v_proj", "o_proj")}}
  np.testing.assert_allclose(jax.jit(follower.apply)(own, X, made), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", STATES)
def test_follower_against_numpy(state):
  """o(P v(x)) in float64, with the anchor's P."""
  anchor, params, follower, follower_params = anchor_and_follower(state)
  x = X[::-1].copy()
  _, made = jax.jit(anchor.apply)(params, X, ops.Rows(LENGTHS))
  weights = np.asarray(made.weights(), np.float64)
  kernels = {name: leaf["kernel"].astype(np.float64) for name, leaf in follower_params["params"].items()}
  v = np.repeat(np.einsum("btd,dkh->btkh", x, kernels["v_proj"]), 2, axis=2)
  wanted = np.einsum("bnts,bsnh,nhd->btd", weights, v, kernels["o_proj"])
  y = np.asarray(jax.jit(follower.apply)(follower_params, x, made))
  for row, length in enumerate(LENGTHS):
    np.testing.assert_allclose(y[row, :length], wanted[row, :length], rtol=0, atol=1e-5)


def test_kind_of_state():
  for state, kind in zip(STATES, (QueryKey, AttentionWeights)):
    anchor, params, _, _ = anchor_and_follower(state)
    _, made = jax.eval_shape(anchor.apply, params, X)
    assert isinstance(made, kind)


def test_both_states_hold_the_same_weights():
  params = init(AnchorAttention(config("query_key")), X)
  anchors = [AnchorAttention(config(state)) for state in STATES]
  weights = [
    jax.jit(lambda x, anchor=anchor: anchor.apply(params, x, ops.Rows(LENGTHS))[1].weights())(X) for anchor in anchors
  ]
  np.testing.assert_array_equal(*weights)
  np.testing.assert_allclose(weights[0].sum(axis=-1), 1.0, rtol=0, atol=1e-6)


def dots(function, *args) -> int:
  return jax.jit(function).lower(*args).as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize(("state", "in_follower"), [("attention_weights", 3), ("query_key", 4)])
def test_products_of_a_program(state, in_follower):
  """Anchor: q, k, v, scores, weighted sum, output.

  Follower: v, weighted sum, output; from q and k that it is handed, the scores are made again, by a fused kernel.
  """
  anchor, params, follower, follower_params = anchor_and_follower(state)
  _, made = jax.eval_shape(anchor.apply, params, X)
  assert dots(anchor.apply, params, X) == 6
  assert dots(follower.apply, follower_params, X, made) == in_follower


def test_products_of_a_step():
  """With a cache a follower never makes scores: the anchor's weights come to it."""
  anchor, params, follower, follower_params = anchor_and_follower("query_key")
  cache, keyless = (LayerCache(*np.zeros((n, 2, 2, 9, 8), np.float32)) for n in (2, 1))
  x, positions = X[:, :1], np.array([[3], [0]], np.int32)
  rows = ops.Rows(positions[:, 0] + 1, offset=positions[:, 0])

  def step(module):
    return jax.jit(functools.partial(module.apply, method=module.extend))

  _, weights, after = step(anchor)(params, x, cache, rows)
  assert isinstance(weights, AttentionWeights)
  assert dots(step(anchor), params, x, cache, rows) == 6
  assert dots(step(follower), follower_params, x, weights, keyless, rows) == 3
  _, after_follower = step(follower)(follower_params, x, weights, keyless, rows)
  assert after.keys is not None
  assert after_follower.keys is None
  # Each row wrote its own slot and no other.
  written = np.abs(np.asarray(after_follower.values)).sum(axis=(1, 3)) > 0
  np.testing.assert_array_equal(written, np.arange(9) == positions)


def test_refused_inputs():
  anchor, params, follower, own = anchor_and_follower("query_key")
  for module, given in ((anchor, (params, X[0])), (anchor, (params, X[..., 1:])), (follower, (own, X[0], None))):
    with pytest.raises(UserError, match=r"attention takes hidden states \[B, T, 32\], not \["):
      module.apply(*given)
  with pytest.raises(UserError, match=r"the second value that AnchorAttention returns, not tuple"):
    follower.apply(own, X, anchor.apply(params, X))
