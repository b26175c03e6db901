"""Rotary position embedding in the half-split layout of Hugging Face's Llama."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.errors import UserError

RopeScaling = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (Su et al., arXiv 2104.09864), with the usual ways to stretch it.

  Attributes:
    theta: the base of the geometric series of wavelengths.
    scaling: ``default`` for none; ``linear`` divides every frequency by ``factor`` (Chen et al., arXiv 2306.15595);
      ``dynamic`` raises theta as a sequence outgrows ``original_max_length`` (dynamic NTK); ``yarn`` stretches long
      wavelengths alone and rescales q and k (Peng et al., arXiv 2309.00071); ``llama3`` is Llama 3.1's.
    factor: by how much wavelengths are stretched.
    original_max_length: dynamic, yarn, llama3: the context length before stretching, in tokens.
    low_freq_factor: llama3: wavelengths above ``original_max_length / low_freq_factor`` are stretched in full.
    high_freq_factor: llama3: wavelengths below ``original_max_length / high_freq_factor`` are left alone.
    beta_fast: yarn: planes that turn more often than this over the original length are left alone.
    beta_slow: yarn: planes that turn less often than this are stretched in full.
    truncate: yarn: whether the bounds between the two are rounded to whole planes.
    attention_factor: yarn: what rotated q and k are multiplied by; ``0.1 ln(factor) + 1`` when None.

  Raises:
    UserError: if there is no such scaling, or a number is not positive.
  """

  theta: float = 10_000.0
  scaling: RopeScaling = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None

  def __post_init__(self) -> None:
    if self.scaling not in get_args(RopeScaling):
      raise UserError(f"there is no rope scaling {self.scaling!r}; there are {', '.join(get_args(RopeScaling))}")
    for name in ("theta", "factor", "original_max_length"):
      if not getattr(self, name) > 0:
        raise UserError(f"rope: {name}={getattr(self, name)!r} (a positive number is needed)")

  @property
  def magnitude(self) -> float:
    """What rotated q and k are multiplied by."""
    if self.scaling != "yarn":
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def rope_frequencies(rope: RopeConfig, head_dim: int, lengths: jax.Array | int | None = None) -> np.ndarray | jax.Array:
  """Radians per position of each of the ``head_dim / 2`` planes, in float32 arithmetic as models were trained with.

  Args:
    rope: theta and scaling.
    head_dim: ``H``, even.
    lengths: int32 ``[B]`` or a number: tokens in each sequence; only ``dynamic`` looks at it, and takes the original
      length when None.

  Returns:
    float32 ``[H / 2]``, or ``[B, H / 2]`` for ``dynamic`` with one length a row.
  """
  planes = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
  wavelengths = np.power(np.float32(rope.theta), planes)
  frequencies = np.float32(1) / wavelengths
  match rope.scaling:
    case "linear":
      return frequencies / np.float32(rope.factor)
    case "dynamic" if lengths is not None:
      # A context stretched by s raises theta so that the longest wavelength is stretched by s. A known length is
      # worked out with NumPy, whose powers are exact to the last bit.
      lib, dtype = (np, np.float64) if isinstance(lengths, int) else (jnp, np.float32)
      longer = lib.maximum(lib.asarray(lengths, dtype), dtype(rope.original_max_length))
      grown = dtype(rope.factor) * longer / dtype(rope.original_max_length) - dtype(rope.factor - 1)
      theta = lib.expand_dims(dtype(rope.theta) * grown ** dtype(head_dim / (head_dim - 2)), -1)
      planes = planes.reshape((1,) * (theta.ndim - 1) + (-1,))
      return np.float32(1) / theta.astype(np.float32) ** planes
    case "yarn":
      stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
      kept = 1 - _yarn_ramp(rope, head_dim)
      return stretched * (1 - kept) + frequencies * kept
    case "llama3":
      # In the order in which PyTorch divides a number by a tensor, to the last bit.
      turns = np.float32(1) / (np.float32(1) / frequencies * np.float32(2 * math.pi))
      turns *= np.float32(rope.original_max_length)
      kept = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
      kept = np.clip(kept, np.float32(0), np.float32(1))
      return (1 - kept) * frequencies / np.float32(rope.factor) + kept * frequencies
  return frequencies


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """How much each plane is stretched, 0 to 1 (arXiv 2309.00071, section 3.2)."""

  def plane(turns: float) -> float:
    """The plane, not a whole number, that turns this often over the original length."""
    length = rope.original_max_length / (turns * 2 * math.pi)
    return head_dim * math.log(length) / (2 * math.log(rope.theta))

  low, high = plane(rope.beta_fast), plane(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  high = low + 0.001 if low == high else high
  ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
  return np.clip(ramp, np.float32(0), np.float32(1))


def apply_rope(
  x: jax.Array, positions: jax.Array, frequencies: np.ndarray | jax.Array, magnitude: float | jax.Array = 1.0
) -> jax.Array:
  """Rotates each head's planes ``(x[i], x[i + H/2])`` by ``position * frequency``, in float32.

  Args:
    x: ``[B, T, heads, H]``.
    positions: int32 ``[T]`` or ``[B, T]``.
    frequencies: ``[H / 2]`` or ``[B, H / 2]``, from `rope_frequencies`.
    magnitude: what the result is multiplied by; see `RopeConfig`.

  Returns:
    ``[B, T, heads, H]`` in x's dtype.
  """
  # A plain product: as a matrix product it would be rounded to bfloat16 or TF32 on accelerators.
  angles = jnp.atleast_2d(positions).astype(jnp.float32)[:, :, None] * jnp.atleast_2d(frequencies)[:, None, :]
  angles = jnp.broadcast_to(angles, (x.shape[0], x.shape[1], angles.shape[-1]))[:, :, None, :]
  cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
