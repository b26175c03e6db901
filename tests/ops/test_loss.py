import jax.numpy as jnp
import numpy as np

from sa_jax import ops


def test_against_numpy():
  rng = np.random.default_rng(0)
  logits, tokens = (5 * rng.normal(size=(2, 3, 11))).astype(np.float32), rng.integers(0, 11, (2, 3))
  exact = logits.astype(np.float64)
  log_probs = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
  wanted = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(ops.token_log_likelihoods(logits, jnp.asarray(tokens)), wanted, rtol=1e-5)


def test_uniform_logits():
  found = ops.token_log_likelihoods(jnp.full((1, 4, 7), 1e4), jnp.zeros((1, 4), jnp.int32))
  np.testing.assert_allclose(found, -np.log(7), rtol=1e-3)


def test_computed_in_float32():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64)), jnp.bfloat16)
  found = ops.token_log_likelihoods(logits, jnp.array([3]))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, ops.token_log_likelihoods(logits.astype(jnp.float32), jnp.array([3])))


def test_a_token_outside_the_vocabulary_has_no_likelihood():
  found = ops.token_log_likelihoods(jnp.zeros((1, 4, 7)), jnp.asarray([[6, 7, -1, 0]]))
  np.testing.assert_allclose(found, [[-np.log(7), np.nan, np.nan, -np.log(7)]], rtol=1e-6)


def test_tokens_of_a_type_smaller_than_the_vocabulary():
  logits = jnp.zeros((1, 300)).at[0, 5].set(3.0).at[0, 261].set(2.0)
  wanted = np.log(np.exp(3) / (298 + np.exp(3) + np.exp(2)))
  np.testing.assert_allclose(ops.token_log_likelihoods(logits, jnp.array([5], jnp.uint8)), [wanted], rtol=1e-5)
