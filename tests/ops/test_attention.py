"""Every attention backend under one test base, against the definition in float64 NumPy."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.ops import AttentionSpec
from sa_jax.ops.attention import blockwise, chunked, flash
from sa_jax.ops.attention.reference import visible


class Implementation(NamedTuple):
  name: str
  attend: Callable
  dtype: str
  tolerance: float


def implementations() -> list[Implementation]:
  """Every backend that this machine has, flash interpreted; blockwise also in blocks that do not divide lengths."""
  found = [
    Implementation("chunked-5", _in_chunks, "float32", 2e-6),
    Implementation("blockwise-5", functools.partial(_with_block, block=5), "float32", 2e-6),
    Implementation("flash-interpreted", _interpreted, "float32", 2e-6),
  ]
  for name, backend in ops.backends.items():
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 2e-2)):
      sample = jax.ShapeDtypeStruct((1, 8, 2, 8), dtype)
      if backend.refusal(jax.default_backend(), sample, ops.Rows(), AttentionSpec()) is None:
        attend = functools.partial(_named, backend=name)
        found.append(Implementation(f"{name}-{dtype}", attend, dtype, tolerance))
  return found


def _with_block(q, k, v, lengths, block):
  return blockwise.attend(q, k, v, ops.Rows(lengths), AttentionSpec(), block=block)


def _in_chunks(q, k, v, lengths):
  return chunked.attend(q, k, v, ops.Rows(lengths), AttentionSpec(), chunk=5)


def _interpreted(q, k, v, lengths):
  return flash.attend(q, k, v, ops.Rows(lengths), AttentionSpec(), interpret=True)


def _named(q, k, v, lengths, backend):
  return ops.attend(q, k, v, ops.Rows(lengths), backend=backend)


# (T, N, K, lengths): one token; one head; GQA; MQA; several blocks of 5, full and ragged, whole blocks of padding.
CASES = [
  (1, 2, 2, None),
  (7, 4, 2, None),
  (13, 4, 1, None),
  (13, 6, 3, (13, 4)),
  (15, 2, 2, (1, 9)),
]


def arrays(length: int, heads: int, kv_heads: int, dtype: str, head_dim: int = 8):
  rng = np.random.default_rng(length)
  shapes = [(2, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
  return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes]


def seen_by(length: int, lengths) -> np.ndarray:
  mask = np.broadcast_to(np.tril(np.ones((length, length), bool)), (2, length, length))
  return mask if lengths is None else mask & (np.arange(length) < np.asarray(lengths)[:, None])[:, None, :]


def weights_in_numpy(q, k, mask) -> np.ndarray:
  """Softmax of masked scores, ``[B, N, T, S]`` in float64."""
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(mask[:, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def in_numpy(q, k, v, mask) -> np.ndarray:
  v = np.repeat(v, q.shape[2] // v.shape[2], axis=2)
  return np.einsum("bnts,bsnh->btnh", weights_in_numpy(q, k, mask), v)


def gradients_in_numpy(q, k, v, d_out, mask):
  """Of ``(out * d_out).sum()``, by the chain rule."""
  group = q.shape[2] // k.shape[2]
  keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
  weights = weights_in_numpy(q, k, mask)
  d_weights = np.einsum("btnh,bsnh->bnts", d_out, values)
  d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
  per_head = [np.einsum("bnts,btnh->bsnh", d_scores, q), np.einsum("bnts,btnh->bsnh", weights, d_out)]
  dk, dv = (x.reshape(*k.shape[:2], k.shape[2], group, -1).sum(axis=3) for x in per_head)
  return np.einsum("bnts,bsnh->btnh", d_scores, keys), dk, dv


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", implementations(), ids=lambda made: made.name)
class TestBackend:
  def test_output(self, implementation, case):
    length, heads, kv_heads, lengths = case
    q, k, v, _ = arrays(length, heads, kv_heads, implementation.dtype)
    given = None if lengths is None else np.asarray(lengths, np.int32)
    out = jax.jit(implementation.attend)(q, k, v, given)
    assert out.dtype == v.dtype
    assert out.shape == q.shape
    assert np.isfinite(np.asarray(out, np.float32)).all()
    wanted = in_numpy(*(x.astype(np.float64) for x in (q, k, v)), seen_by(length, lengths))
    for row, end in enumerate(lengths or (length, length)):
      np.testing.assert_allclose(
        np.asarray(out, np.float64)[row, :end], wanted[row, :end], rtol=0, atol=implementation.tolerance
      )

  def test_gradients(self, implementation, case):
    length, heads, kv_heads, lengths = case
    q, k, v, d_out = arrays(length, heads, kv_heads, implementation.dtype)
    given = None if lengths is None else np.asarray(lengths, np.int32)
    # What lies past a row's end is never read.
    d_out *= (np.arange(length) < np.asarray(lengths or (length, length))[:, None])[:, :, None, None]

    def total(q, k, v):
      return (implementation.attend(q, k, v, given) * d_out).astype(jnp.float32).sum()

    found = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    wanted = gradients_in_numpy(*(x.astype(np.float64) for x in (q, k, v, d_out)), seen_by(length, lengths))
    for ours, theirs in zip(found, wanted, strict=True):
      scale = max(1.0, np.abs(theirs).max())
      np.testing.assert_allclose(
        np.asarray(ours, np.float64), theirs, rtol=0, atol=5 * implementation.tolerance * scale
      )


def test_numpy_gradients_by_finite_differences():
  q, k, v, d_out = (x.astype(np.float64) for x in arrays(5, 4, 2, "float32"))
  mask = seen_by(5, (5, 3))
  rng = np.random.default_rng(0)
  gradients = gradients_in_numpy(q, k, v, d_out, mask)
  for number, gradient in enumerate(gradients):
    direction, step = rng.normal(size=gradient.shape), 1e-6
    ends = []
    for sign in (1, -1):
      moved = [x + sign * step * direction if i == number else x for i, x in enumerate((q, k, v))]
      ends.append((in_numpy(*moved, mask) * d_out).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum(), rel=1e-6)


def test_large_scores_stay_finite():
  """Scores in the thousands: the maximum is taken out before the exponential."""
  q, k, v, _ = arrays(13, 2, 2, "float32")
  wanted = in_numpy(*(x.astype(np.float64) for x in (100 * q, 100 * k, v)), seen_by(13, None))
  for attend in (functools.partial(_with_block, block=5), functools.partial(_named, backend="reference")):
    np.testing.assert_allclose(jax.jit(attend)(100 * q, 100 * k, v, None), wanted, rtol=0, atol=2e-3)


class TestVisible:
  def test_causal(self):
    mask = visible(jnp.arange(3), jnp.arange(3), None)
    np.testing.assert_array_equal(mask.astype(int), [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]])

  def test_lengths(self):
    mask = visible(jnp.arange(3), jnp.arange(3), jnp.array([1, 3]))
    np.testing.assert_array_equal(
      mask.astype(int),
      [
        [[1, 0, 0], [1, 0, 0], [1, 0, 0]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
      ],
    )

  def test_a_step_against_a_cache(self):
    """One query a row, at the slots 2 and 0 of four."""
    mask = visible(jnp.array([[2], [0]]), jnp.arange(4), None)
    np.testing.assert_array_equal(mask.astype(int), [[[1, 1, 1, 0]], [[1, 0, 0, 0]]])


def test_weights_and_their_sums():
  q, k, v, _ = arrays(9, 6, 3, "float32")
  lengths = np.array([9, 5], np.int32)
  weights = jax.jit(ops.attention_weights)(q, k, ops.Rows(lengths))
  wanted = weights_in_numpy(q.astype(np.float64), k.astype(np.float64), seen_by(9, lengths))
  np.testing.assert_allclose(weights, wanted, rtol=0, atol=1e-6)
  assert np.asarray(weights)[0, 0, 0].tolist() == [1.0] + [0.0] * 8
  out = jax.jit(ops.apply_weights)(weights, v)
  np.testing.assert_allclose(out, in_numpy(*(x.astype(np.float64) for x in (q, k, v)), seen_by(9, lengths)), atol=2e-6)


def test_weights_are_softmaxed_in_float32():
  """bfloat16 weights are float32 weights, rounded once."""
  q, k, _, _ = arrays(9, 2, 2, "bfloat16")
  exact = weights_in_numpy(q.astype(np.float64), k.astype(np.float64), seen_by(9, None))
  weights = jax.jit(ops.attention_weights)(q, k)
  assert weights.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(weights, np.float64), exact, rtol=2**-8, atol=1e-7)


class TestChoice:
  def shape(self, length: int = 64, dtype: str = "bfloat16", head_dim: int = 64):
    return jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)

  @pytest.mark.parametrize(
    ("platform", "length", "dtype", "head_dim", "chosen"),
    [
      ("cpu", 1024, "float32", 64, "reference"),
      ("cpu", 1025, "float32", 64, "blockwise"),
      ("tpu", 4096, "bfloat16", 64, "splash"),
      ("gpu", 64, "bfloat16", 64, "cudnn"),
      ("gpu", 4096, "bfloat16", 128, "cudnn"),
      ("gpu", 4096, "float32", 64, "blockwise"),
      ("gpu", 4096, "bfloat16", 256, "blockwise"),
      ("gpu", 64, "bfloat16", 60, "reference"),
    ],
  )
  def test_auto(self, platform, length, dtype, head_dim, chosen):
    q = self.shape(length, dtype, head_dim)
    assert ops.choose_backend("auto", q, q, platform=platform) == chosen

  def test_by_name(self):
    for name in ("reference", "blockwise"):
      assert ops.choose_backend(name, self.shape(), self.shape(), platform="tpu") == name

  @pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_dim", "message"),
    [
      (
        "fast",
        "cpu",
        "float32",
        64,
        "unknown attention backend 'fast'; choose from auto, cudnn, flash, splash, blockwise, reference, chunked",
      ),
      (
        "cudnn",
        "cpu",
        "bfloat16",
        64,
        "this: it runs on NVIDIA GPUs, but this is cpu; use blockwise, reference, chunked, or 'auto'",
      ),
      ("cudnn", "gpu", "float32", 64, "it needs bfloat16 or float16, but q is float32"),
      ("cudnn", "gpu", "bfloat16", 60, "a head dimension that is a multiple of 8 up to 128, but q has 60"),
      ("flash", "cpu", "bfloat16", 64, "'flash' cannot compute this: it runs on NVIDIA GPUs, but this is cpu"),
      ("flash", "gpu", "float32", 64, "it needs bfloat16 or float16, but q is float32"),
      ("flash", "gpu", "bfloat16", 256, "a head dimension of 16, 32, 64 or 128, but q has 256"),
      ("cudnn", "gpu", "bfloat16", 256, "multiple of 8 up to 128, but q has 256"),
    ],
  )
  def test_refused(self, name, platform, dtype, head_dim, message):
    q = self.shape(64, dtype, head_dim)
    with pytest.raises(ValueError, match=message):
      ops.choose_backend(name, q, q, platform=platform)

  @pytest.mark.parametrize(
    ("k", "v"),
    [((2, 5, 3, 8), (2, 5, 3, 8)), ((2, 5, 2, 8), (2, 5, 4, 8)), ((2, 5, 2, 4),) * 2],
  )
  def test_shapes_that_do_not_fit(self, k, v):
    with pytest.raises(ValueError, match=r"attend takes q \[B, T, N, H\], k \[B, S, K, H\] and v"):
      ops.attend(jnp.zeros((2, 5, 4, 8)), jnp.zeros(k), jnp.zeros(v))
