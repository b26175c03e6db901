"""Rotary position embedding."""

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.fields import Constraint, Count, Positive, check_fields

RopeScaling = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "none"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (Su et al., arXiv 2104.09864), with the usual scaling methods.

  Attributes:
    theta: the base of the geometric series of wavelengths.
    scaling: ``default`` for none; ``linear`` divides every frequency by ``factor`` (Chen et al., arXiv 2306.15595);
      ``dynamic`` raises theta as a sequence outgrows ``original_max_length`` (dynamic NTK); ``yarn`` stretches only
      long wavelengths and rescales q and k (Peng et al., arXiv 2309.00071); ``llama3`` is Llama 3.1's; ``longrope``
      stretches each wavelength by its own factor, for short and for long sequences (Ding et al., arXiv 2402.13753);
      ``none`` does not rotate (Kazemnejad et al., arXiv 2305.19466).
    factor: the stretch of the wavelengths.
    original_max_length: dynamic, yarn, llama3, longrope: the context length before stretching, in tokens.
    low_freq_factor: llama3: wavelengths above ``original_max_length / low_freq_factor`` are stretched in full.
    high_freq_factor: llama3: wavelengths below ``original_max_length / high_freq_factor`` are unchanged.
    beta_fast: yarn: planes that turn more often than this over the original length are unchanged.
    beta_slow: yarn: planes that turn less often than this are stretched in full.
    truncate: yarn: whether the bounds between the two are rounded to whole planes.
    attention_factor: yarn, longrope: what rotated q and k are multiplied by; when None, yarn's ``0.1 ln(factor) + 1``,
      longrope's ``sqrt(1 + ln(factor) / ln(original_max_length))``.
    short_factors: longrope: each wavelength's factor in sequences of at most ``original_max_length`` tokens.
    long_factors: longrope: the same in longer sequences.
    fraction: the fraction of each head, from its start, that is rotated; the rest is unchanged.
    query_growth: queries at position ``p`` are multiplied by ``1 + query_growth * ln(1 + p // original_max_length)``
      (Llama 4's, in Ministral 3).
    interleaved: whether a plane is two adjacent elements ``(x[2i], x[2i + 1])`` (GLM, Cohere), instead of
      ``(x[i], x[i + R/2])`` with R rotated elements (Llama).

  Raises:
    UserError: if the scaling is unknown, or a number is not positive.
  """

  theta: Positive = 10_000.0
  scaling: RopeScaling = "default"
  factor: Positive = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: Count = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  fraction: Annotated[float, Constraint(lambda part: 0 < part <= 1, "a number above 0 and at most 1")] = 1.0
  query_growth: float = 0.0
  interleaved: bool = False

  def __post_init__(self) -> None:
    check_fields(self, "rope")

  @property
  def magnitude(self) -> float:
    """The factor of rotated q and k."""
    if self.scaling not in ("yarn", "longrope"):
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    if self.factor <= 1:
      return 1.0
    if self.scaling == "yarn":
      return 0.1 * math.log(self.factor) + 1.0
    return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_length))

  @property
  def depends_on_length(self) -> bool:
    """Whether the rotation also depends on the sequence length."""
    return self.scaling in ("dynamic", "longrope")

  def rotated(self, head_dim: int) -> int:
    """Number of rotated elements per head."""
    return int(head_dim * self.fraction)


def rope_frequencies(rope: RopeConfig, head_dim: int, lengths: jax.Array | int | None = None) -> np.ndarray | jax.Array:
  """Radians per position of each of the ``R / 2`` planes, in float32 arithmetic, as in training.

  Args:
    rope: theta and scaling.
    head_dim: ``H``, of which an even number ``R`` is rotated.
    lengths: int32 ``[B]`` or a number: tokens per sequence; only used by ``dynamic`` and ``longrope``, which take the
      original length if None.

  Returns:
    float32 ``[R / 2]``, or ``[B, R / 2]`` if it depends on the lengths and these are per row.
  """
  head_dim = int(head_dim * rope.fraction)
  planes = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
  wavelengths = np.power(np.float32(rope.theta), planes)
  frequencies = np.float32(1) / wavelengths
  match rope.scaling:
    case "linear":
      return frequencies / np.float32(rope.factor)
    case "dynamic" if lengths is not None:
      # A context stretched by s raises theta so that the longest wavelength is stretched by s. A concrete length is
      # handled in NumPy, whose powers are exact to the last bit.
      lib, dtype = (np, np.float64) if isinstance(lengths, int) else (jnp, np.float32)
      longer = lib.maximum(lib.asarray(lengths, dtype), dtype(rope.original_max_length))
      grown = dtype(rope.factor) * longer / dtype(rope.original_max_length) - dtype(rope.factor - 1)
      theta = lib.expand_dims(dtype(rope.theta) * grown ** dtype(head_dim / (head_dim - 2)), -1)
      planes = planes.reshape((1,) * (theta.ndim - 1) + (-1,))
      return np.float32(1) / theta.astype(np.float32) ** planes
    case "longrope":
      short, long = (
        np.float32(1) / (np.asarray(factors, np.float32) * wavelengths)
        for factors in (rope.short_factors, rope.long_factors)
      )
      if lengths is None or isinstance(lengths, int):
        return long if lengths is not None and lengths > rope.original_max_length else short
      return jnp.where(jnp.expand_dims(lengths, -1) > rope.original_max_length, long, short)
    case "none":
      return np.zeros_like(frequencies)
    case "yarn":
      stretched = np.float32(1) / (np.float32(rope.factor) * wavelengths)
      kept = 1 - _yarn_ramp(rope, head_dim)
      return stretched * (1 - kept) + frequencies * kept
    case "llama3":
      # In PyTorch's order of operations for number / tensor, to match the last bit.
      turns = np.float32(1) / (np.float32(1) / frequencies * np.float32(2 * math.pi))
      turns *= np.float32(rope.original_max_length)
      kept = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
      kept = np.clip(kept, np.float32(0), np.float32(1))
      return (1 - kept) * frequencies / np.float32(rope.factor) + kept * frequencies
  return frequencies


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Stretch of each plane, 0 to 1 (arXiv 2309.00071, section 3.2)."""

  def plane(turns: float) -> float:
    """The (fractional) plane that turns this often over the original length."""
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
  x: jax.Array,
  positions: jax.Array,
  frequencies: np.ndarray | jax.Array,
  magnitude: float | jax.Array = 1.0,
  interleaved: bool = False,
) -> jax.Array:
  """Rotates each head's planes by ``position * frequency``, in float32.

  Args:
    x: ``[B, T, heads, H]``.
    positions: int32 ``[T]`` or ``[B, T]``.
    frequencies: ``[R / 2]`` or ``[B, R / 2]``, from `rope_frequencies`; elements after the first R are unchanged.
    magnitude: factor of the rotated elements; see `RopeConfig`.
    interleaved: which two elements form a plane; see `RopeConfig`.

  Returns:
    ``[B, T, heads, H]`` in x's dtype.
  """
  # Elementwise: a matrix product would be rounded to bfloat16 or TF32 on accelerators.
  angles = jnp.atleast_2d(positions).astype(jnp.float32)[:, :, None] * jnp.atleast_2d(frequencies)[:, None, :]
  angles = jnp.broadcast_to(angles, (x.shape[0], x.shape[1], angles.shape[-1]))[:, :, None, :]
  cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
  half = angles.shape[-1]
  turned, kept = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
  if interleaved:
    turned = _swap_layout(turned, (half, 2))
  first, second = turned[..., :half], turned[..., half:]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  if interleaved:
    turned = _swap_layout(turned, (2, half))
  turned = turned.astype(x.dtype)
  return jnp.concatenate([turned, kept], axis=-1) if kept.shape[-1] else turned


def _swap_layout(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Transposes the last axis as a matrix of this shape: from adjacent pairs to two halves, and back."""
  return x.reshape(*x.shape[:-1], *shape).swapaxes(-1, -2).reshape(x.shape)


def grow_queries(q: jax.Array, positions: jax.Array, rope: RopeConfig) -> jax.Array:
  """Scales queries ``[B, T, N, H]`` by their positions, int32 ``[T]`` or ``[B, T]``; see `RopeConfig`."""
  if not rope.query_growth:
    return q
  turns = jnp.atleast_2d(positions)[:, :, None, None] // rope.original_max_length
  return q * (1 + rope.query_growth * jnp.log1p(turns.astype(jnp.float32))).astype(q.dtype)
