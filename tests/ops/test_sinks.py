"""Attention sinks: one key more that takes a share and gives nothing, in every backend that has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.nn import QueryKey
from sa_jax.ops.attention import blockwise, chunked, flash, flash_decode, reference, splash

B, T, N, K, H = 2, 70, 4, 2, 16
SPEC = ops.AttentionSpec(window=21)


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, H), draw(N) * 2, draw(B, T, N, H)


def formula(q, k, v, sinks):
  """In NumPy: the sink is a column of the scores, of which no value comes."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
  behind = np.arange(T)[:, None] - np.arange(T)
  scores = np.where((behind >= 0) & (behind < SPEC.window), scores, -np.inf)
  column = np.broadcast_to(np.asarray(sinks, np.float64)[None, :, None, None], (B, N, T, 1))
  weights = np.exp(np.concatenate([scores, column], axis=-1))
  weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :-1]
  return np.einsum("BNTS,BSNH->BTNH", weights, v)


BACKENDS = {
  "reference": reference.attend,
  "blockwise": functools.partial(blockwise.attend, block=16),
  "chunked": functools.partial(chunked.attend, chunk=16),
  "flash": functools.partial(flash.attend, interpret=True),
  "splash": functools.partial(splash.attend, interpret=True),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients(name, arrays):
  *qkv, sinks, d_out = arrays

  def run(attend, q, k, v, sinks):
    out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, ops.Rows(sinks=sinks), SPEC), q, k, v, sinks)
    return out, pull(d_out)

  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    out, gradients = jax.jit(functools.partial(run, BACKENDS[name]))(*qkv, sinks)
  np.testing.assert_allclose(out, formula(*qkv, sinks), atol=5e-6)
  _, expected = jax.jit(functools.partial(run, reference.attend))(*qkv, sinks)
  for found, wanted in zip(gradients, expected, strict=True):
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_the_reference_s_gradient_of_sinks(arrays):
  """Against differences of the formula."""
  *qkv, sinks, d_out = arrays
  d_out = np.asarray(d_out, np.float64)
  loss = lambda sinks: (reference.attend(*qkv, ops.Rows(sinks=sinks), SPEC) * arrays[-1]).sum()
  found = jax.jit(jax.grad(loss))(sinks)
  for head in range(N):
    step = np.eye(N)[head] * 1e-4
    more, less = ((formula(*qkv, np.asarray(sinks, np.float64) + sign * step) * d_out).sum() for sign in (1, -1))
    np.testing.assert_allclose(found[head], (more - less) / 2e-4, rtol=1e-3, atol=1e-4)


def test_new_tokens(arrays):
  """By plain JAX, and by the kernel, whose followers get the same weights."""
  q, k, v, sinks, _ = arrays
  heads_first = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 128 - T), (0, 0)))
  cached, offset = (heads_first(k), heads_first(v)), jnp.asarray([T - 1, 11], jnp.int32)
  at = lambda x: x[jnp.arange(B), offset]
  rows = ops.Rows(offset=offset, sinks=sinks)
  out, weights, _ = ops.decode_attend(at(q)[:, None], (at(k)[:, None], at(v)[:, None]), cached, rows, with_weights=True)
  whole = jax.jit(lambda *qkv: reference.attend(*qkv, ops.Rows(sinks=sinks), ops.AttentionSpec()))(q, k, v)
  np.testing.assert_allclose(out[:, 0], at(whole), atol=2e-6)
  how = flash_decode.How(H**-0.5, with_weights=True)
  found, of_kernel, _ = flash_decode.attend(at(q), (at(k), at(v)), cached, rows, how, interpret=True)
  np.testing.assert_allclose(found, out[:, 0], atol=2e-6)
  np.testing.assert_allclose(of_kernel, weights[:, :, 0], atol=1e-6)
  assert float(weights.sum(axis=-1).max()) < 1


def test_heads_that_are_taken_bring_their_sinks(arrays):
  q, k, _, sinks, _ = arrays
  state = QueryKey(q, k, ops.Rows(sinks=sinks), backend="reference")
  head_map = jnp.asarray([2, 0, 3, 3])
  taken = state.take_heads(head_map)
  np.testing.assert_allclose(taken.weights(), state.weights()[:, head_map], atol=1e-6)


def test_backends_without_them_are_named_or_not_chosen(arrays):
  q, k, v, sinks, _ = (x.astype(jnp.bfloat16) for x in arrays)
  rows = ops.Rows(sinks=sinks)
  assert ops.choose_backend("auto", q, k, platform="gpu") == "cudnn"
  assert ops.choose_backend("auto", q, k, rows, platform="gpu") == "flash"
  assert ops.choose_backend("auto", q, k, rows, platform="tpu") == "splash"
  with pytest.raises(sa_jax.UserError, match="'cudnn' cannot compute this: it does not support attention sinks"):
    ops.choose_backend("cudnn", q, k, rows, platform="gpu")
  with pytest.raises(sa_jax.UserError, match=r"sinks must be floating-point of shape \(4,\)"):
    ops.attend(q, k, v, ops.Rows(sinks=sinks[:3]))
