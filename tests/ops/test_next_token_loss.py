"""The chunked loss against the plain one: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 11, 6)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 17)).astype(np.float32)
TOKENS = RNG.integers(0, 17, (2, 11)).astype(np.int32)
WEIGHTS = RNG.uniform(size=(2, 11)).astype(np.float32)


def chunked(hidden, kernel, tokens, weights, chunk):
  return ops.next_token_loss(lambda hidden: hidden @ kernel, hidden, tokens, weights, chunk=chunk)


def plain(hidden, kernel, weights):
  log_probs = jax.nn.log_softmax(hidden[:, :-1] @ kernel)
  chosen = jnp.take_along_axis(log_probs, jnp.asarray(TOKENS)[:, 1:, None], axis=-1)[..., 0]
  return -(chosen * weights[:, 1:]).sum()


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_value_and_gradient(chunk):
  loss = lambda hidden, kernel: chunked(hidden, kernel, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), chunk)[0]
  got = jax.value_and_grad(loss, argnums=(0, 1))(HIDDEN, KERNEL)
  want = jax.value_and_grad(plain, argnums=(0, 1))(HIDDEN, KERNEL, WEIGHTS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_count_is_the_weight_of_what_is_predicted():
  total, count = chunked(jnp.asarray(HIDDEN), KERNEL, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), 4)
  np.testing.assert_allclose(count, WEIGHTS[:, 1:].sum(), rtol=1e-6)
  unweighted, tokens = chunked(jnp.asarray(HIDDEN), KERNEL, jnp.asarray(TOKENS), None, 4)
  assert tokens == 2 * 10
  assert total.dtype == unweighted.dtype == jnp.float32
  np.testing.assert_allclose(unweighted, plain(HIDDEN, KERNEL, np.ones_like(WEIGHTS)), rtol=1e-6)


def test_memory_is_that_of_one_chunk():
  length, vocab, chunk = 1024, 2048, 64
  hidden, tokens = jax.ShapeDtypeStruct((1, length, 8), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
  kernel = jax.ShapeDtypeStruct((8, vocab), jnp.float32)

  def temporaries(chunk):
    loss = lambda hidden, kernel, tokens: chunked(hidden, kernel, tokens, None, chunk)[0]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernel, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = length * vocab * 4
  assert temporaries(length) > logits
  assert temporaries(chunk) < logits / 4


@pytest.mark.parametrize(
  ("tokens", "weights", "chunk", "message"),
  [
    (TOKENS[:, :5], None, 4, r"not \(2, 11, 6\), \(2, 5\)"),
    (TOKENS, WEIGHTS[:, :5], 4, r"\(2, 11\), \(2, 5\)"),
    (TOKENS, None, 0, "chunk must be at least 1 position, not 0"),
  ],
)
def test_what_does_not_fit_is_named(tokens, weights, chunk, message):
  with pytest.raises(ValueError, match=message):
    chunked(jnp.asarray(HIDDEN), KERNEL, tokens, weights, chunk)
