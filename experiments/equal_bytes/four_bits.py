"""Ways to round keys and values to four bits, by the change in predictions; see README.md in this folder.

python experiments/equal_bytes/four_bits.py --model MODEL.gguf --text TEXT
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sa_jax
from sa_jax import ops
from sa_jax.nn import Cache
from sa_jax.ops.attention import decode

Rounding = Callable[[jax.Array], jax.Array]
"""Keys or values ``[1, T, K, H]`` → their rounded values."""
SCALE = jnp.bfloat16


def symmetric(x: jax.Array) -> jax.Array:
  """To -7 to 7 times a scale per vector."""
  scale = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 7).astype(SCALE).astype(x.dtype)
  return jnp.round(x / scale) * scale


def ours(x: jax.Array) -> jax.Array:
  """As `sa_jax.ops.FORMATS` stores vectors: to -8 to 7."""
  stored = ops.FORMATS["int4"].store(x)
  return stored.numbers().astype(x.dtype) * stored.scale.astype(x.dtype)


def with_offset(x: jax.Array) -> jax.Array:
  """To 0 to 15 times a scale, plus an offset."""
  offset = jnp.min(x, axis=-1, keepdims=True)
  scale = ((jnp.max(x, axis=-1, keepdims=True) - offset) / 15).astype(SCALE).astype(x.dtype)
  offset = offset.astype(SCALE).astype(x.dtype)
  return jnp.clip(jnp.round((x - offset) / scale), 0, 15) * scale + offset


def in_halves(rounding: Rounding) -> Rounding:
  """Each half of a vector separately."""
  return lambda x: rounding(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)


def rotated(rounding: Rounding) -> Rounding:
  """After multiplication by a Hadamard matrix, which is its own inverse."""
  return lambda x: ops.hadamard(rounding(ops.hadamard(x)))


def centred(rounding: Rounding) -> Rounding:
  """Without the mean over a row's tokens except the first, assumed known: softmax does not depend on it."""

  def of(x: jax.Array) -> jax.Array:
    mean = x[:, 1:].mean(axis=1, keepdims=True)
    return rounding(x - mean) + mean

  return of


def by_channel(tokens: int) -> Rounding:
  """Each channel of blocks of tokens separately, with an offset (KIVI, arXiv 2402.02750), including the last block."""

  def of(x: jax.Array) -> jax.Array:
    channels = jnp.moveaxis(x, 1, -1)
    parts = channels.reshape(*channels.shape[:-1], -1, tokens)
    return jnp.moveaxis(with_offset(parts).reshape(channels.shape), -1, 1)

  return of


WAYS: dict[str, Rounding] = {
  "a scale, -7 to 7": symmetric,
  "a scale for each half": in_halves(symmetric),
  "a scale and an offset": with_offset,
  "a scale and an offset for each half": in_halves(with_offset),
  "a scale, -8 to 7": ours,
  "rotated; a scale, -7 to 7": rotated(symmetric),
  "rotated; a scale, -8 to 7": rotated(ours),
  "rotated; a scale for each half, -8 to 7": rotated(in_halves(ours)),
  "rotated; a scale and an offset": rotated(with_offset),
  "rotated; a scale and an offset for each half": rotated(in_halves(with_offset)),
  "centred, rotated; a scale, -8 to 7": centred(rotated(ours)),
  "a scale and an offset for each channel of 32 tokens": by_channel(32),
}


class Predictions:
  """Log-probabilities of a model whose keys and values are rounded before they enter its cache.

  Args:
    flags: command-line flags.
  """

  def __init__(self, flags: argparse.Namespace):
    self.model, self.params = sa_jax.from_pretrained(flags.model, None, "float32", layout="layers")
    tokenizer = sa_jax.load_tokenizer(flags.model)
    tokens = tokenizer.encode(flags.text.read_text(encoding="utf-8"), special=False)
    self.tokens = sa_jax.rows_of(tokens, 512, flags.rows, tokenizer.opening())
    self.exact = self.of(None, None)

  def of(self, keys: Rounding | None, values: Rounding | None) -> np.ndarray:
    """``[rows, T, V]``."""
    config, plan = self.model.config, self.model.plan

    @jax.jit
    def row(params: sa_jax.trees.Params, tokens: jax.Array) -> jax.Array:
      cache = Cache.empty(config, plan, *tokens.shape)
      rows = ops.Rows(offset=jnp.zeros(1, jnp.int32), lengths=jnp.full(1, tokens.shape[1], jnp.int32))
      hidden, _ = self.model.apply({"params": params}, tokens, cache, rows, method=self.model.extend)
      return jax.nn.log_softmax(self.model.apply({"params": params}, hidden, method=self.model.logits)[0])

    def attend(q, new, *rest, **options):
      rounded = (x if rounding is None else rounding(x) for rounding, x in zip((keys, values), new, strict=True))
      return decode.decode_attend(q, tuple(rounded), *rest, **options)

    plain, ops.decode_attend = ops.decode_attend, attend
    try:
      jax.clear_caches()
      return np.stack([row(self.params, tokens[None]) for tokens in self.tokens])
    finally:
      ops.decode_attend = plain

  def beside_exact(self, found: np.ndarray) -> tuple[float, float]:
    """The mean KL divergence from the exact predictions, in nats, and perplexity relative to the exact one."""
    divergence = np.mean([(np.exp(a) * (a - b)).sum(-1).mean() for a, b in zip(self.exact, found, strict=True)])
    next_ones = self.tokens[:, 1:, None]
    loss = lambda x: -np.take_along_axis(x[:, :-1], next_ones, axis=-1).mean()
    return float(divergence), math.exp(loss(found) - loss(self.exact))


def main() -> None:
  """Prints one row per method, for keys alone and for values alone."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--text", type=Path, required=True)
  parser.add_argument("--rows", type=int, default=3, help="of 512 tokens")
  predictions = Predictions(parser.parse_args())
  print(f"{'':<52} {'keys: KL, × exact':<20} values")
  for name, way in WAYS.items():
    keys, values = (predictions.beside_exact(predictions.of(*pair)) for pair in ((way, None), (None, way)))
    print(f"{name:<52} {keys[0]:.4f}  {keys[1]:.3f}       {values[0]:.4f}  {values[1]:.3f}", flush=True)


if __name__ == "__main__":
  main()
