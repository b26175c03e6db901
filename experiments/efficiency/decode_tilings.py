"""The decode kernel alone: an anchor's time with different tilings, and how fast it reads its cache.

python experiments/efficiency/decode_tilings.py --json tilings.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.ops.attention import flash_decode, stored
from sa_jax.ops.attention.flash_decode import Tiling
from sa_jax.trees import Tree

KV_HEADS, GROUP, WIDTH, STEPS = 8, 4, 128, 32
"""The shapes of Llama 3 8B's layers; one program runs as many steps as a token needs."""


@dataclasses.dataclass(frozen=True)
class Cache:
  """The kernel's input.

  Attributes:
    stored: ``bfloat16``, or one of `ops.FORMATS`.
    values: size of a head's values.
    batch: rows.
    slots: slots per row, all filled.
  """

  stored: str
  values: int
  batch: int
  slots: int

  def arrays(self) -> tuple[list[jax.Array], tuple[Tree, Tree], jax.Array]:
    """A token's query, key and value; cached keys and values; the token's slots."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    token = [normal(seed, self.batch, heads, width) for seed, (heads, width) in enumerate(self._heads())]
    store = (lambda x: x) if self.stored == "bfloat16" else ops.FORMATS[self.stored].store
    make = jax.jit(
      lambda width, seed: store(normal(seed, self.batch, KV_HEADS, self.slots, width)), static_argnums=(0, 1)
    )
    return token, (make(WIDTH, 3), make(self.values, 4)), jnp.full(self.batch, self.slots - 1, jnp.int32)

  def _heads(self) -> list[tuple[int, int]]:
    return [(KV_HEADS * GROUP, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, self.values)]


def reference(token: list[jax.Array], cache: tuple[Tree, Tree], positions: jax.Array) -> jax.Array:
  """The expected output, by plain JAX."""
  q, key, value = token
  keys, values = (ops.write_slot(each, new, positions) for each, new in zip(cache, (key, value), strict=True))
  rows, spec = ops.Rows(offset=positions), ops.AttentionSpec(scale=WIDTH**-0.5)
  weights = ops.decode_weights(q[:, None], keys, rows, spec)
  return ops.decode_apply(weights, values)[:, 0].astype(jnp.float32)


def measure(cache: Cache, tiling: Tiling, plain: bool, interpret: bool) -> dict[str, float]:
  """Seconds per step, bytes per second, and the largest error relative to the largest magnitude."""
  token, arrays, positions = cache.arrays()
  bits = 16 if cache.stored == "bfloat16" else ops.FORMATS[cache.stored].bits
  nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
  expected = jax.jit(reference)(token, arrays, positions)
  before = flash_decode.TILINGS, flash_decode.block_of
  flash_decode.TILINGS = {**before[0], (bits, cache.values < WIDTH): tiling}
  if plain:  # how an interpreter converts four bits
    flash_decode.block_of = lambda ref, here, dtype, _: stored.block_of(ref, here, dtype, True)

  def steps(token: list[jax.Array], arrays: tuple[Tree, Tree], positions: jax.Array) -> tuple[jax.Array, Tree, Tree]:
    def step(_: jax.Array, carry: tuple[jax.Array, Tree, Tree]) -> tuple[jax.Array, Tree, Tree]:
      total, keys, values = carry
      q, key, value = token
      rows, how = ops.Rows(offset=positions), flash_decode.How(WIDTH**-0.5)
      out, _, (keys, values) = flash_decode.attend(q, (key, value), (keys, values), rows, how, interpret)
      return total + out.astype(jnp.float32), keys, values

    return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(expected.shape, jnp.float32), *arrays))

  try:
    compiled = jax.jit(steps, donate_argnums=1).lower(token, arrays, positions).compile()
  finally:
    flash_decode.TILINGS, flash_decode.block_of = before
  seconds = []
  for _ in range(5):
    begun = time.perf_counter()
    total, *arrays = jax.block_until_ready(compiled(token, tuple(arrays), positions))
    seconds.append((time.perf_counter() - begun) / STEPS)
  off = float(jnp.abs(total / STEPS - expected).max() / jnp.abs(expected).max())
  median = float(np.median(seconds[1:]))
  return {"seconds": median, "bytes_per_second": nbytes / median, "off": off}


def main() -> None:
  """Prints one line per tiling."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--caches", nargs="+", default=["bfloat16:128", "bfloat16:64", "int8:128", "int4:128", "int4:64"])
  add("--batch-size", type=int, default=16)
  add("--length", type=int, default=16384)
  add("--blocks", type=int, nargs="+", default=[64, 128, 256])
  add("--warps", type=int, nargs="+", default=[1, 2, 4])
  add("--stages", type=int, nargs="+", default=[2, 3])
  add("--interpret", action="store_true", help="on any device, slowly")
  add("--json", type=Path)
  flags = parser.parse_args()
  rows = []
  for name in flags.caches:
    kind, width = name.split(":")
    cache = Cache(kind, int(width), flags.batch_size, flags.length)
    grid = itertools.product(flags.blocks, flags.warps, flags.stages, [False, True] if kind == "int4" else [False])
    for block, warps, stages, plain in grid:
      tiling = Tiling(block, warps, stages)
      row = {"cache": name, "plain": plain, **tiling._asdict()}
      try:
        row |= measure(cache, tiling, plain, flags.interpret)
        told = f"{1e3 * row['seconds']:.4f} ms  {row['bytes_per_second'] / 1e9:6.0f} GB/s  off {row['off']:.4f}"
      except jax.errors.JaxRuntimeError as error:  # shared memory, for example
        told = row["error"] = str(error).splitlines()[0][:200]
      rows.append(row)
      how = f"block {block:3d}, {warps} warps, {stages} stages{', plain conversion' * plain}"
      print(f"{name:<13} {how}: {told}", flush=True)
  if flags.json:
    flags.json.write_text(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()
