"""Windows, soft caps and scales: literal masks, a NumPy formula, and every backend against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.ops.attention import blockwise
from sa_jax.ops.attention.reference import visible

SPECS = [
  ops.AttentionSpec(window=5),
  ops.AttentionSpec(window=1),
  ops.AttentionSpec(softcap=2.0),
  ops.AttentionSpec(window=9, softcap=1.5, scale=0.7),
]


def arrays(length=23):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 4, 8)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def formula(q, k, v, lengths, spec):
  """The definition, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for row, head, t in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
    first = 0 if spec.window is None else max(t - spec.window + 1, 0)
    seen = slice(first, min(t + 1, lengths[row]))
    scores = k[row, seen, head // 2] @ q[row, t, head] * (spec.scale or q.shape[-1] ** -0.5)
    if spec.softcap:
      scores = spec.softcap * np.tanh(scores / spec.softcap)
    weights = np.exp(scores - scores.max()) if scores.size else scores
    out[row, t, head] = weights @ v[row, seen, head // 2] / max(weights.sum(), 1e-30)
  return out


def test_window_mask():
  seen = visible(jnp.arange(5), jnp.arange(5), None, window=3)[0]
  expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
  np.testing.assert_array_equal(seen.astype(int), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_backends(backend, spec):
  q, k, v, _ = arrays()
  lengths = np.array([23, 14])
  chosen = ops.backends[backend].attend
  attend = chosen if backend == "reference" else lambda *args: chosen(*args, block=4)
  out = attend(q, k, v, ops.Rows(jnp.asarray(lengths)), spec)
  expected = formula(q, k, v, lengths, spec)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=2e-6)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.window != 1], ids=str)
def test_blockwise_gradient(spec):
  q, k, v, cotangent = arrays()
  grads = []
  for attend in (ops.backends["reference"].attend, functools.partial(blockwise.attend, block=4)):
    loss = lambda q, k, v, attend=attend: (attend(q, k, v, ops.Rows(), spec) * cotangent).sum()
    grads.append(jax.grad(loss, argnums=(0, 1, 2))(q, k, v))
  for expected, found in zip(*grads):
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_choice():
  q, k, _, _ = (x.astype(jnp.bfloat16) for x in arrays())
  assert ops.choose_backend("auto", q, k, spec=ops.AttentionSpec(window=5), platform="gpu") == "cudnn"
  assert ops.choose_backend("auto", q, k, spec=ops.AttentionSpec(softcap=5.0), platform="gpu") != "cudnn"
  with pytest.raises(ValueError, match=r"does not support a soft cap"):
    ops.choose_backend("cudnn", q, k, spec=ops.AttentionSpec(softcap=5.0), platform="gpu")
  with pytest.raises(ValueError, match=r"window=0 .must be a positive number or None"):
    ops.AttentionSpec(window=0)
