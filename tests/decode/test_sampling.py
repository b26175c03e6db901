"""Filters against NumPy, draws against the distribution that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.decode import Sampler

LOGITS = np.random.default_rng(0).normal(scale=2.0, size=(3, 20)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
  exp = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
  """-inf outside the k largest, row by row."""
  out = np.full_like(logits, -np.inf)
  for row, values in enumerate(logits):
    best = sorted(range(len(values)), key=lambda token: -values[token])[:k]
    out[row, best] = values[best]
  return out


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
  """The shortest list of likeliest tokens whose probabilities reach p, row by row."""
  out = np.full_like(logits, -np.inf)
  for row, values in enumerate(logits):
    probs, reached = softmax(values), 0.0
    for token in sorted(range(len(values)), key=lambda token: -values[token]):
      if reached >= p:
        break
      out[row, token] = values[token]
      reached += probs[token]
  return out


@pytest.mark.parametrize("k", [1, 3, 19, 20, 50])
def test_top_k(k):
  np.testing.assert_allclose(Sampler(1.0, top_k=k).filter(LOGITS), keep_top_k(LOGITS, k), rtol=1e-6)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_p(p):
  np.testing.assert_allclose(Sampler(1.0, top_p=p).filter(LOGITS), keep_top_p(LOGITS, p), rtol=1e-6)


def test_order_of_filters():
  """Temperature, then top-k, then top-p of what is left: as Hugging Face does."""
  found = Sampler(0.7, top_k=6, top_p=0.8).filter(LOGITS)
  wanted = keep_top_p(keep_top_k(LOGITS / np.float32(0.7), 6), 0.8)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  other = keep_top_k(keep_top_p(LOGITS / np.float32(0.7), 0.8), 6)
  assert (np.isfinite(other) != np.isfinite(wanted)).any()


def test_greedy():
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = Sampler()(LOGITS, keys)
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=-1))


@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(2.0), Sampler(0.8, top_k=4), Sampler(1.5, top_p=0.7)])
def test_distribution(sampler):
  """20,000 draws of one row: each token's frequency within 4.5 standard errors."""
  draws = 20_000
  logits = np.broadcast_to(LOGITS[0], (draws, 20))
  tokens = jax.jit(sampler)(logits, jax.random.split(jax.random.key(1), draws))
  found = np.bincount(np.asarray(tokens), minlength=20) / draws
  wanted = LOGITS[:1] / np.float32(sampler.temperature)
  wanted = wanted if sampler.top_k is None else keep_top_k(wanted, sampler.top_k)
  wanted = wanted if sampler.top_p is None else keep_top_p(wanted, sampler.top_p)
  probs = softmax(wanted)[0]
  assert (np.abs(found - probs) <= 4.5 * np.sqrt(probs * (1 - probs) / draws)).all()


def test_a_row_is_drawn_with_its_own_key():
  keys = jax.random.split(jax.random.key(0), 3)
  together = Sampler(1.0)(LOGITS, keys)
  alone = [Sampler(1.0)(LOGITS[row : row + 1], keys[row : row + 1])[0] for row in range(3)]
  np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"temperature": -1.0}, r"temperature=-1.0 \(must be 0 \(greedy\) or at least 1e-06\)"),
    ({"temperature": 1e-39}, "temperature=1e-39 .*at least 1e-06"),
    ({"temperature": float("nan")}, "temperature=nan .must be a finite number"),
    ({"temperature": float("inf")}, "temperature=inf .must be a finite number"),
    ({"temperature": 1.0, "top_k": 0}, r"top_k=0 \(must be at least 1\)"),
    ({"temperature": 1.0, "top_k": "5"}, "top_k='5' \\(must be an integer or None\\)"),
    ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 \(must be above 0, at most 1\)"),
    ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1 .must be"),
    ({"top_k": 5}, "set a temperature above 0, or leave them out"),
    ({"top_p": 0.5}, "set a temperature above 0"),
    ({"temperature": np.float32(-1)}, "temperature=-1.0 .must be 0"),
    ({"temperature": 1.0, "top_p": jnp.float32(7)}, "top_p=7.0 .must be"),
    ({"temperature": "hot"}, "temperature='hot' .must be a number or None"),
  ],
)
def test_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Sampler(**arguments)


@pytest.mark.parametrize("zero", [np.float32(0), np.int64(0), jnp.float32(0)])
def test_a_zero_of_any_type_is_greedy(zero):
  assert Sampler(zero) == Sampler()
