import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops

X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
SCALE = np.linspace(0.5, 2.0, 16, dtype=np.float32)


def test_against_numpy():
  x = X.astype(np.float64)
  wanted = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * SCALE
  np.testing.assert_allclose(ops.rms_norm(X, SCALE, 1e-5), wanted, rtol=1e-5)


def test_eps_counts():
  small = X * np.float32(1e-3)
  wanted = small / np.sqrt((small.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-2)
  np.testing.assert_allclose(ops.rms_norm(small, np.ones(16, np.float32), 1e-2), wanted, rtol=1e-5)


def test_statistics_in_float32():
  """bfloat16 is rounded to twice: after the quotient, as in Llama, and after scaling."""
  x = X.astype(jnp.bfloat16)
  out = ops.rms_norm(x, SCALE, 1e-5)
  assert out.dtype == jnp.bfloat16
  exact = x.astype(np.float64)
  quotient = (exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
  wanted = (quotient.astype(np.float64) * SCALE.astype(jnp.bfloat16).astype(np.float64)).astype(jnp.bfloat16)
  assert (np.asarray(out) == wanted).mean() > 0.95
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted.astype(np.float64), rtol=2**-7)


def test_gradient():
  """The output does not change when x is scaled: the gradient is orthogonal to x."""
  gradient = jax.grad(lambda x: ops.rms_norm(x, SCALE, 1e-12)[..., 0].sum())(X)
  assert np.abs(gradient).max() > 0.1
  np.testing.assert_allclose((gradient * X).sum(axis=-1), 0.0, atol=1e-5)
