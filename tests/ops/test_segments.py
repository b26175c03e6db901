"""Packed rows: several documents in one row are several rows, in every backend and state, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import nn, ops
from sa_jax.ops.attention import blockwise, flash, reference, splash
from tests import tiny

LENGTHS = (5, 1, 9)
PACKED = sum(LENGTHS) + 3
BACKENDS = [
  reference.attend,
  functools.partial(blockwise.attend, block=4),
  functools.partial(flash.attend, interpret=True),
]
SEGMENTS = jnp.asarray([[1] * 5 + [2] + [3] * 9 + [0] * 3, [1] * 15 + [0] * 3], jnp.int32)


def arrays(length, heads=4, kv_heads=2, head_dim=8):
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, (2, length, n, head_dim)) for key, n in zip(keys, (heads, kv_heads, kv_heads, heads))]


def masked(q, k, v, segments, window=None):
  """By the formula, in NumPy: a query sees keys of its document, at or before it, in its window."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  group = q.shape[2] // k.shape[2]
  scores = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, group, 2)) / np.sqrt(q.shape[-1])
  t, s = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None]
  seen = (s <= t) & (segments[:, :, None] == segments[:, None, :])[:, None]
  if window:
    seen = seen & (s > t - window)
  weights = np.where(seen, np.exp(scores), 0)
  return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), np.repeat(v, group, 2))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attend", BACKENDS)
def test_by_the_formula(attend, window):
  q, k, v, _ = arrays(PACKED)
  out = jax.jit(lambda q, k, v, s: attend(q, k, v, ops.Rows(segments=s), ops.AttentionSpec(window)))(q, k, v, SEGMENTS)
  np.testing.assert_allclose(out, masked(q, k, v, np.asarray(SEGMENTS), window), atol=1e-5)


def value_and_gradients(attend, q, k, v, d_out):
  def run(q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(d_out)

  return jax.jit(run)(q, k, v, d_out)


def close(a, b, atol=2e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), a, b)


def test_blockwise_gradients_are_the_references():
  q, k, v, d_out = arrays(PACKED)
  got, want = (
    value_and_gradients(lambda *qkv: attend(*qkv, ops.Rows(segments=SEGMENTS), ops.AttentionSpec()), q, k, v, d_out)
    for attend in (functools.partial(blockwise.attend, block=4), reference.attend)
  )
  close(got, want)


@pytest.mark.parametrize("spec", [ops.AttentionSpec(window=70), ops.AttentionSpec(softcap=2.0, scale=0.3)])
def test_flash_kernels_are_the_reference(spec):
  """Over several blocks: windows, documents that end in blocks and on their borders, soft caps, part of the queries."""
  q, k, v, d_out = arrays(200, 6, 2, 16)
  segments = jnp.asarray(np.repeat([[1, 1, 2, 3, 0], [1, 1, 1, 1, 2]], [64, 20, 44, 32, 40], axis=1), jnp.int32)
  got, want = (
    value_and_gradients(
      lambda q, k, v: attend(q, k, v, ops.Rows(segments=segments, offset=jnp.int32(60)), spec),
      q[:, 60:150],
      k,
      v,
      d_out[:, 60:150],
    )
    for attend in (functools.partial(flash.attend, interpret=True), reference.attend)
  )
  close(got, want)


def test_splash_kernels_are_the_reference():
  q, k, v, d_out = arrays(130, 2, 1)
  segments = jnp.asarray(np.repeat([[1, 2, 2, 3, 0], [1, 1, 1, 1, 2]], 26, axis=1), jnp.int32)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    got, want = (
      value_and_gradients(lambda *qkv: attend(*qkv, ops.Rows(segments=segments), ops.AttentionSpec()), q, k, v, d_out)
      for attend in (functools.partial(splash.attend, interpret=True), reference.attend)
    )
  close(got, want)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("attend", BACKENDS)
def test_part_of_the_queries(attend, window):
  """Queries 7 to 15 of 18 with all keys: their rows of the whole, and keys' gradients add up."""
  q, k, v, d_out = arrays(PACKED)
  spec = ops.AttentionSpec(window)
  whole = value_and_gradients(
    lambda *qkv: reference.attend(*qkv, ops.Rows(segments=SEGMENTS), spec),
    q,
    k,
    v,
    d_out.at[:, :7].set(0).at[:, 15:].set(0),
  )
  part = lambda q, k, v: attend(q, k, v, ops.Rows(segments=SEGMENTS, offset=jnp.int32(7)), spec)
  out, (dq, dk, dv) = value_and_gradients(part, q[:, 7:15], k, v, d_out[:, 7:15])
  close((out, dq, dk, dv), (whole[0][:, 7:15], whole[1][0][:, 7:15], *whole[1][1:]))


def test_auto_chooses_a_backend_that_can_and_a_named_one_says_why_not():
  q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16) for heads in (4, 2))
  packed, split = ops.Rows(segments=jnp.zeros((1, 4096), jnp.int32)), ops.Rows(offset=jnp.int32(0))
  assert ops.choose_backend("auto", q, k, platform="gpu") == "cudnn"
  assert ops.choose_backend("auto", q, k, packed, platform="gpu") == "flash"
  assert ops.choose_backend("auto", q, k, split, platform="gpu") == "flash"
  assert ops.choose_backend("auto", q, k, platform="gpu", spec=ops.AttentionSpec(softcap=50.0)) == "flash"
  assert ops.choose_backend("auto", q, k, packed, platform="tpu") == "splash"
  assert ops.choose_backend("auto", q, k, split, platform="tpu") == "blockwise"
  with pytest.raises(ValueError, match="'cudnn' cannot compute this: it does not support segments"):
    ops.choose_backend("cudnn", q, k, packed, platform="gpu")
  with pytest.raises(ValueError, match="'splash' cannot compute this: it does not support a query offset"):
    ops.choose_backend("splash", q, k, split, platform="tpu")


@pytest.mark.parametrize("state", ["query_key", "attention_weights"])
def test_packed_documents_are_documents_in_rows_of_their_own(state):
  """Logits, and gradients of the loss, of a model that shares."""
  model = tiny.model("0:1", num_layers=2, attention_state=state)
  params = jax.tree.map(jnp.asarray, tiny.params(model, "runs"))
  documents = [tiny.tokens(1, length, seed=length)[0] for length in LENGTHS]
  packed = np.zeros((1, PACKED), np.int32)
  rows = np.zeros((3, max(LENGTHS)), np.int32)
  starts = np.cumsum([0, *LENGTHS])
  for row, (document, start) in enumerate(zip(documents, starts)):
    packed[0, start : start + len(document)] = document
    rows[row, : len(document)] = document

  @jax.jit
  def run(params, tokens, segments, weights):
    def loss(params):
      logits = model.apply({"params": params}, tokens, segments=segments)
      return (ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]) * weights[:, 1:]).sum(), logits

    return jax.grad(loss, has_aux=True)(params)

  weights_packed = (np.asarray(SEGMENTS[:1]) > 0).astype(np.float32)
  weights_packed[0, starts[:-1]] = 0
  weights = (np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]).astype(np.float32)
  together, logits = run(params, packed, SEGMENTS[:1], weights_packed)
  apart, expected = run(params, rows, None, weights)
  for row, (length, start) in enumerate(zip(LENGTHS, starts)):
    np.testing.assert_allclose(logits[0, start : start + length], expected[row, :length], atol=1e-5)
  close(together, apart, atol=1e-5)


def test_what_cannot_be_packed_is_said():
  dynamic = tiny.model("0:1", num_layers=2, rope=ops.RopeConfig(scaling="dynamic"))
  tokens = jnp.zeros((1, 4), jnp.int32)
  shape = lambda model, segments: jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, None, segments))
  with pytest.raises(ValueError, match="depends on a document's length"):
    shape(dynamic, tokens)
  with pytest.raises(ValueError, match="segments must be integers of shape"):
    shape(tiny.model("0:1", num_layers=2), jnp.zeros((1, 5), jnp.int32))
  with pytest.raises(ValueError, match="segments must be integers of shape"):
    ops.attend(*arrays(6)[:3], ops.Rows(segments=jnp.zeros((2, 5), jnp.int32)))


def test_states_tell_the_weights_of_packed_rows():
  q, k, _, _ = arrays(PACKED)
  state = nn.QueryKey(q, k, ops.Rows(segments=SEGMENTS))
  weights = np.asarray(jax.jit(lambda state: state.weights())(state))
  assert (weights[0, :, 6:15, :6] == 0).all()
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  rows = jax.jit(lambda state: state.weights(jnp.asarray([6, 9])))(state)
  np.testing.assert_allclose(rows, weights[:, :, [6, 9]], atol=1e-6)
