"""Rotary position embedding in the half-split layout of Hugging Face's Llama."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (Su et al., arXiv 2104.09864).

  Attributes:
    theta: the base of the geometric series of wavelengths.
    scaling: ``default`` for none, ``llama3`` for the frequency-dependent stretch of Llama 3.1 and later.
    factor: llama3: by how much the longest wavelengths are stretched.
    low_freq_factor: llama3: wavelengths above ``original_max_length / low_freq_factor`` are stretched in full.
    high_freq_factor: llama3: wavelengths below ``original_max_length / high_freq_factor`` are left alone.
    original_max_length: llama3: the context length before stretching, in tokens.
  """

  theta: float = 10_000.0
  scaling: Literal["default", "llama3"] = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Radians per position of each of the ``head_dim / 2`` planes.

  The ``llama3`` scaling divides the frequency of planes whose wavelength exceeds ``original_max_length /
  low_freq_factor`` by ``factor``, keeps those below ``original_max_length / high_freq_factor``, and interpolates
  between (Llama 3.1's reference code, ``apply_scaling``).

  Args:
    rope: theta and scaling.
    head_dim: ``H``, even.

  Returns:
    ``[H / 2]`` float32.
  """
  frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if rope.scaling == "llama3":
    turns = rope.original_max_length * frequencies / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    frequencies = frequencies * (kept + (1.0 - kept) / rope.factor)
  return frequencies.astype(np.float32)


def apply_rope(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Rotates each head's planes ``(x[i], x[i + H/2])`` by ``position * frequency``, in float32.

  Args:
    x: ``[B, T, heads, H]``.
    positions: int32 ``[T]`` or ``[B, T]``.
    frequencies: ``[H / 2]``, from `rope_frequencies`.

  Returns:
    ``[B, T, heads, H]`` in x's dtype.
  """
  # A plain product: as a matrix product it would be rounded to bfloat16 or TF32 on accelerators.
  angles = jnp.expand_dims(positions.astype(jnp.float32), -1) * np.expand_dims(frequencies, tuple(range(positions.ndim)))
  angles = jnp.broadcast_to(angles, (x.shape[0], x.shape[1], angles.shape[-1]))[:, :, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
