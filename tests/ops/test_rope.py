"""Rotary embedding against the published formulas, transcribed in float64."""

import math

import jax
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.ops import RopeConfig

LLAMA3 = RopeConfig(
  500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192
)


def published(rope: RopeConfig, head_dim: int) -> list[float]:
  """Su et al. section 3.4.2, then Llama 3.1's `apply_scaling`, one plane at a time."""
  out = []
  for plane in range(head_dim // 2):
    frequency = rope.theta ** (-2 * plane / head_dim)
    if rope.scaling == "llama3":
      wavelength = 2 * math.pi / frequency
      if wavelength > rope.original_max_length / rope.low_freq_factor:
        frequency /= rope.factor
      elif wavelength >= rope.original_max_length / rope.high_freq_factor:
        smooth = (rope.original_max_length / wavelength - rope.low_freq_factor) / (
          rope.high_freq_factor - rope.low_freq_factor
        )
        frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
    out.append(frequency)
  return out


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(100_000.0), LLAMA3])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies(rope, head_dim):
  np.testing.assert_allclose(ops.rope_frequencies(rope, head_dim), published(rope, head_dim), rtol=1e-6)


def test_llama3_has_all_three_kinds_of_planes():
  """Kept, between, and stretched: or the test above would not see the formula's branches."""
  ratio = np.array(published(RopeConfig(LLAMA3.theta), 128)) / np.array(published(LLAMA3, 128))
  assert (ratio == 1).any()
  assert np.isclose(ratio, 8).any()
  assert ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize("rope", [RopeConfig(), LLAMA3])
def test_rotation(rope):
  """Each plane (x[i], x[i + H/2]) turns by position × frequency."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 4], [100, 7, 3000, 0, 1]], np.int32)
  found = np.asarray(jax.jit(lambda x, p: ops.apply_rope(x, p, ops.rope_frequencies(rope, 16)))(x, positions))
  angles = positions[:, :, None].astype(np.float64) * np.array(published(rope, 16))
  turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)[:, :, None]
  wanted = np.concatenate([turned.real, turned.imag], axis=-1)
  # float32 angles of some thousands of radians carry an error of their size times 2^-24.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
  np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=2e-6)
  np.testing.assert_array_equal(found[0, 0], x[0, 0])


def test_positions_of_one_row_serve_all():
  x = np.random.default_rng(0).normal(size=(2, 4, 1, 8)).astype(np.float32)
  frequencies = ops.rope_frequencies(RopeConfig(), 8)
  one = ops.apply_rope(x, np.arange(4, dtype=np.int32), frequencies)
  both = ops.apply_rope(x, np.tile(np.arange(4, dtype=np.int32), (2, 1)), frequencies)
  np.testing.assert_array_equal(one, both)


def test_products_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
  frequencies = ops.rope_frequencies(RopeConfig(), 16)
  at = lambda x, position: np.asarray(ops.apply_rope(x, np.array([position], np.int32), frequencies))
  near = (at(q, 5) * at(k, 2)).sum()
  assert (at(q, 105) * at(k, 102)).sum() == pytest.approx(near, abs=1e-4)
  assert (at(q, 5) * at(k, 3)).sum() != pytest.approx(near, abs=1e-2)


def test_computed_in_float32():
  """No matrix product, which accelerators would round; bfloat16 in, float32 within, bfloat16 out."""
  x = jax.ShapeDtypeStruct((1, 4, 2, 8), "bfloat16")
  rope = jax.jit(lambda x: ops.apply_rope(x, np.arange(4, dtype=np.int32), ops.rope_frequencies(RopeConfig(), 8)))
  lowered = rope.lower(x)
  assert lowered.out_info.dtype == "bfloat16"
  assert "dot_general" not in lowered.as_text()
  assert "multiply" in lowered.as_text()
  assert not [line for line in lowered.as_text().splitlines() if "stablehlo.multiply" in line and "bf16" in line]
