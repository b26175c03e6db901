"""This GPU's attention kernels, compiled, against plain JAX in float32; exits with 1 if one is off.

python experiments/efficiency/check_kernels.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.ops.attention import decode
from sa_jax.trees import Tree

TOLERANCE = 2e-2
"""Relative to the largest magnitude: bfloat16 has 8 bits."""


def normal(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
  """Random bfloat16 arrays."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def wide(tree: Tree) -> Tree:
  """Casts to float32, for which no kernel is chosen."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def off(found: Tree, expected: Tree) -> float:
  """The largest distance, relative to the largest magnitude of each array."""
  relative = lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / (jnp.max(jnp.abs(b)) + 1e-9))
  return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))


def attended(q: jax.Array, new: Tree, cached: Tree, rows: ops.Rows) -> tuple[jax.Array, jax.Array]:
  """The outputs of an anchor and a follower for a new token."""
  out, weights, (_, values) = ops.decode_attend(q, new, cached, rows, with_weights=True)
  return out, ops.decode_follow(weights, new[1], values, rows.offset, rows.pages)[0]


def stored(cache_dtype: str | None, *cached: jax.Array) -> Tree:
  """Keys and values as a cache holds them."""
  return cached if cache_dtype is None else tuple(map(ops.FORMATS[cache_dtype].store, cached))


def kernels_of(given: tuple[jax.Array, Tree, Tree]) -> str:
  """Which kernels decode queries, new keys and values, and a cache."""
  return decode.which_kernels(1, given[0].dtype, *given[2]) or "no kernel"


def decoding() -> Iterator[tuple[str, float]]:
  """One new token per row, with and without sinks, quantised caches and narrow values."""
  batch, heads, kv_heads, slots = 4, 16, 4, 512
  offset = jnp.asarray([0, 70, 128, slots - 1], jnp.int32)
  widths = (128, 128), (128, 64), (128, 32), (64, 32)
  for (width, narrow), sinks, cache_dtype in itertools.product(widths, (0, 1), (None, *ops.FORMATS)):
    q, key, value, keys, values = normal(
      0, (batch, 1, heads, width), (batch, 1, kv_heads, width), (batch, 1, kv_heads, narrow),
      (batch, kv_heads, slots, width), (batch, kv_heads, slots, narrow),
    )  # fmt: skip
    rows = ops.Rows(offset=offset, sinks=jnp.linspace(-1, 3, heads) if sinks else None)
    given = q, (key, value), stored(cache_dtype, keys, values)
    distance = off(jax.jit(attended)(*given, rows), jax.jit(attended)(*wide(given), rows))
    name = f"decode H={width} R={narrow}{' sinks' * sinks}, cache in {cache_dtype or 'bfloat16'}"
    yield f"{name}, {kernels_of(given)}", distance


def in_pages() -> Iterator[tuple[str, float]]:
  """One new token per row with paged caches: rows of one, three and two pages, and two unused pages."""
  size, none = 64, 8
  table = jnp.asarray([[4, 6, none], [0, 5, 2], [3, none, none]], jnp.int32)
  owners = jnp.asarray([1, -1, 1, 2, 0, 1, 0, -1], jnp.int32)
  firsts = size * jnp.asarray([0, 0, 2, 0, 0, 1, 1, 0], jnp.int32)
  rows = ops.Rows(offset=jnp.asarray([63, 130, 5], jnp.int32), pages=ops.Pages(table, owners, firsts))
  for cache_dtype in (None, *ops.FORMATS):
    q, key, value, keys, values = normal(
      3, (3, 1, 32, 128), (3, 1, 8, 128), (3, 1, 8, 128), (none, 8, size, 128), (none, 8, size, 128)
    )
    given = q, (key, value), stored(cache_dtype, keys, values)
    distance = off(jax.jit(attended)(*given, rows), jax.jit(attended)(*wide(given), rows))
    yield f"decode, cache in pages, in {cache_dtype or 'bfloat16'}, {kernels_of(given)}", distance


def gradients(backend: str, rows: ops.Rows) -> Callable[..., Tree]:
  """Gradients of the output times ``seed``, with respect to queries, keys and values."""

  def total(q: jax.Array, k: jax.Array, v: jax.Array, seed: jax.Array) -> jax.Array:
    return jnp.sum(ops.attend(q, k, v, rows, backend=backend).astype(jnp.float32) * seed)

  return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def whole_rows() -> Iterator[tuple[str, float]]:
  """Gradients of whole rows by backend."""
  for backend, (width, narrow), sinks in (
    ("flash", (128, 128), True), ("flash", (64, 64), True), ("flash", (128, 64), False),
    ("cudnn", (128, 128), False), ("cudnn", (128, 64), False), ("auto", (128, 32), False), ("auto", (64, 64), True),
  ):  # fmt: skip
    q, k, v, seed = normal(1, (2, 256, 8, width), (2, 256, 2, width), (2, 256, 2, narrow), (2, 256, 8, narrow))
    rows = ops.Rows(sinks=jnp.linspace(-1, 3, 8) if sinks else None)

    found = gradients(backend, rows)(q, k, v, seed.astype(jnp.float32))
    expected = gradients("reference", rows)(*wide((q, k, v, seed)))
    yield f"{backend} H={width} R={narrow}{' sinks' * sinks}, gradients", off(found, expected)


def groups() -> Iterator[tuple[str, float]]:
  """Gradients of a group's layers that share one backward pass, with each device's own kernels."""
  length, layers, spec = 4096, 4, ops.AttentionSpec()
  for heads, kv_heads in ((4, 2), (2, 2)):
    q, k, v, seeds = normal(
      2, (2, length, heads, 128), (2, length, kv_heads, 128),
      (layers, 2, length, kv_heads, 128), (layers, 2, length, heads, 128),
    )  # fmt: skip
    parts = ops.backends["cudnn"].parts
    if parts is None or not parts.takes(q, ops.Rows(), spec):
      return
    how = ops.Followers(parts, spec, layers, 128)

    def together(q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array, how: ops.Followers = how) -> jax.Array:
      taps = ops.taps(q, k, ops.Rows(), how)
      layer = lambda v, tap, seed: jnp.sum(ops.follow(q, k, v, tap, ops.Rows(), how).astype(jnp.float32) * seed)
      return jnp.sum(jax.lax.map(lambda each: layer(*each), (v, taps, seeds)))

    def apart(q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array) -> jax.Array:
      layer = lambda v, seed: jnp.sum(ops.attend(q, k, v, backend="chunked") * seed)
      return jnp.sum(jax.lax.map(lambda each: layer(*each), (v, seeds)))

    gradient = lambda total: jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    found = gradient(together)(q, k, v, seeds.astype(jnp.float32))
    expected = gradient(apart)(*wide((q, k, v, seeds)))
    yield f"one backward pass, {layers} followers, {heads} heads of {kv_heads}, gradients", off(found, expected)


CASES = {"decode": decoding, "pages": in_pages, "rows": whole_rows, "groups": groups}


def main() -> None:
  """Prints one line per case."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
  parser.add_argument("--decode-kernels", default=decode.PREFERRED, choices=["flash_decode", "hopper_decode"])
  given = parser.parse_args()
  decode.PREFERRED = given.decode_kernels
  jax.config.update("jax_default_matmul_precision", "highest")
  print(jax.devices()[0].device_kind, jax.__version__)
  wrong = 0
  for name, distance in itertools.chain.from_iterable(CASES[case]() for case in given.cases):
    wrong += not distance < TOLERANCE
    print(f"{'ok' if distance < TOLERANCE else 'WRONG':<6} {distance:.1e}  {name}", flush=True)
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
