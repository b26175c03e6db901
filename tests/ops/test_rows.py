"""What a query may see besides what is before it: biases, masks, both sides, keys of another sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.ops.attention import blockwise, chunked
from tests import tiny

B, T, S, N, K, H = 2, 9, 13, 4, 2, 8


def arrays(queries=T, keys=S):
  rng = np.random.default_rng(0)
  shapes = ((queries, N), (keys, K), (keys, K), (queries, N))
  return [jnp.asarray(rng.normal(size=(B, length, heads, H)), jnp.float32) for length, heads in shapes]


def formula(q, k, v, seen, bias=0.0):
  """In NumPy; ``seen`` and ``bias`` broadcast to ``[B, N, T, S]``."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H) + bias
  weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
  return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(axis=-1, keepdims=True), v)


def by_blocks(q, k, v, rows, spec):
  return blockwise.attend(q, k, v, rows, spec, block=4)


def by_chunks(q, k, v, rows, spec):
  return chunked.attend(q, k, v, rows, spec, chunk=4)


@pytest.mark.parametrize("attend", [ops.backends["reference"].attend, by_blocks, by_chunks])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [None, (13, 6)])
def test_cross_attention(attend, window, lengths):
  """Queries of one sequence, keys of another, longer one: values and gradients."""
  q, k, v, cotangent = arrays()
  rows = ops.Rows(None if lengths is None else jnp.asarray(lengths), causal=False)
  ends = np.asarray(lengths or (S, S))
  near = np.abs(np.arange(S)[None] - np.arange(T)[:, None]) < (window or S)
  seen = (np.arange(S) < ends[:, None])[:, None, None] & near
  # A query whose window lies past its row's end sees nothing, and means nothing.
  some = seen.any(axis=-1)[:, 0][..., None, None] & np.ones((B, T, 1, 1), bool)
  spec = ops.AttentionSpec(window)
  out = jax.jit(lambda *qkv: attend(*qkv, rows, spec))(q, k, v)
  wanted = formula(q, k, v, np.where(some.swapaxes(1, 2), seen, True))
  np.testing.assert_allclose(np.where(some, out, 0), np.where(some, wanted, 0), atol=2e-6)
  loss = lambda attend: lambda *qkv: (jnp.where(some, attend(*qkv, rows, spec), 0) * cotangent).sum()
  found, expected = (
    jax.jit(jax.grad(loss(each), argnums=(0, 1, 2)))(q, k, v) for each in (attend, ops.backends["reference"].attend)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected)


@pytest.mark.parametrize("attend", [ops.backends["reference"].attend, by_blocks, by_chunks])
def test_edges(attend):
  """Queries far from every key, lengths beyond the keys, no queries at all."""
  q, k, v, _ = arrays(queries=40, keys=6)
  apart = attend(q, k, v, ops.Rows(causal=False), ops.AttentionSpec(window=3))
  assert np.isfinite(apart).all()
  gradient = jax.grad(lambda q: attend(q, k, v, ops.Rows(causal=False), ops.AttentionSpec(window=3))[:, :4].sum())(q)
  assert np.isfinite(gradient).all()
  beyond = attend(q, k, v, ops.Rows(jnp.array([9, 6]), causal=False), ops.AttentionSpec())
  np.testing.assert_allclose(beyond, formula(q, k, v, True), atol=2e-6)
  assert attend(q[:, :0], k, v, ops.Rows(causal=False), ops.AttentionSpec()).shape == (B, 0, N, H)


@pytest.mark.parametrize("heads", [1, N])
def test_bias_and_mask(heads):
  """ALiBi's bias (Press et al., arXiv 2108.12409), and a mask that hides every third key."""
  q, k, v, _ = arrays(T, T)
  distance = np.arange(T)[None, :] - np.arange(T)[:, None]
  bias = (2.0 ** -np.arange(1, heads + 1))[:, None, None] * distance
  mask = (np.arange(T) % 3 != 2)[None] | (distance == 0)
  rows = ops.Rows(bias=jnp.asarray(bias, jnp.float32)[None], mask=jnp.asarray(mask)[None, None])
  for attend in (ops.backends["reference"].attend, by_chunks):
    out = attend(q, k, v, rows, ops.AttentionSpec())
    np.testing.assert_allclose(out, formula(q, k, v, mask & (distance <= 0), bias), atol=2e-6)


def test_a_call_that_a_backend_cannot_compute_names_those_that_can():
  q, k, v, _ = arrays(T, T)
  rows = ops.Rows(bias=jnp.zeros((1, 1, T, T)))
  with pytest.raises(
    ValueError, match="'blockwise' cannot compute this: it does not support a score bias; use reference, chunked"
  ):
    ops.attend(q, k, v, rows, backend="blockwise")
  shape = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)
  assert ops.choose_backend("auto", shape, shape, ops.Rows(causal=False), platform="gpu") == "cudnn"
  assert ops.choose_backend("auto", shape, shape, ops.Rows(causal=False), platform="tpu") == "blockwise"


def test_shapes_that_do_not_fit_are_named_together():
  q, k, v, _ = arrays()
  with pytest.raises(ValueError, match=r"rows.causal=False") as raised:
    ops.attend(q, k, v, ops.Rows(lengths=jnp.ones(3, int), mask=jnp.ones((B, 3, T, S), bool)))
  assert len(str(raised.value).splitlines()) == 4


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ({"lengths": [3, 4]}, "lengths must be integers of shape (2,), not a Python list"),
    ({"lengths": jnp.ones(B)}, "lengths must be integers of shape (2,), not float32 of shape (2,)"),
    ({"segments": jnp.ones((B, S))}, "segments must be integers of shape (2, 13), not float32"),
    ({"offset": 4}, "offset must be an integer, or integers of shape (2,), not a Python int"),
    ({"offset": np.float32(4)}, "offset must be an integer, or integers of shape (2,), not float32 of shape ()"),
    ({"offset": jnp.ones(3, int)}, "offset must be an integer, or integers of shape (2,), not int32 of shape (3,)"),
    (
      {"mask": jnp.ones((B, 1, T, S), int)},
      "mask must be bool of shape [B or 1, N or 1, T, S] for (2, 4, 9, 13), not int32",
    ),
    (
      {"bias": jnp.ones((1, 1, T, S), int)},
      "bias must be floating-point of shape [B or 1, N or 1, T, S] for (2, 4, 9, 13), not int",
    ),
    (
      {"bias": jnp.ones((T, S))},
      "bias must be floating-point of shape [B or 1, N or 1, T, S] for (2, 4, 9, 13), not float32 of",
    ),
  ],
)
def test_rows_are_arrays_of_their_types_and_shapes(rows, message):
  q, k, v, _ = arrays()
  for backend in ("auto", "reference"):
    with pytest.raises(sa_jax.UserError) as raised:
      ops.attend(q, k, v, ops.Rows(**{"causal": False} | rows), backend=backend)
    assert str(raised.value).startswith(f"attend: {message}")


def test_queries_keys_and_values_are_arrays():
  q, k, v, _ = arrays()
  with pytest.raises(sa_jax.UserError, match="a Python list.*float32 of shape.*int32 of shape"):
    ops.attend(q.tolist(), k, v.astype(int))


def test_a_backend_of_ones_own(monkeypatch):
  seen = []

  def mine(q, k, v, rows, spec):
    seen.append(rows)
    return ops.backends["reference"].attend(q, k, v, rows, spec)

  monkeypatch.setitem(ops.backends, "mine", None)  # so that it is taken away when the test ends
  del ops.backends["mine"]
  ops.register_backend("mine", ops.Backend(mine))
  q, k, v, _ = arrays(T, T)
  np.testing.assert_array_equal(ops.attend(q, k, v, backend="mine"), ops.attend(q, k, v, backend="reference"))
  assert len(seen) == 1
  model = tiny.model("0:1", num_layers=2, attention="mine")
  tokens, params = tiny.tokens(1, 5), tiny.params(model, "runs")
  same = tiny.model("0:1", num_layers=2, attention="reference").apply({"params": params}, tokens)
  np.testing.assert_array_equal(model.apply({"params": params}, tokens), same)
  with pytest.raises(ValueError, match="'mine' cannot compute this: it does not support a mask"):
    ops.attend(q, k, v, ops.Rows(mask=jnp.ones((1, 1, T, T), bool)), backend="mine")
  for name, backend, message in (
    ("mine", ops.Backend(mine), "the attention backend 'mine' already exists"),
    ("other", mine, "backend must be a Backend, such as"),
    (
      "other",
      ops.Backend(mine, serves=frozenset({"bias"})),
      "unknown demands 'bias'; choose from .*'a score bias'",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      ops.register_backend(name, backend)
