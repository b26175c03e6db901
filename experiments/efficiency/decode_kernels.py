"""The decode kernel alone, in Pallas Triton and in Pallas Mosaic GPU, compared on one Hopper GPU.

python experiments/efficiency/decode_kernels.py --json gpu/h200/decode-kernels.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.cli.common import show_table
from sa_jax.ops.attention import flash_decode, hopper_decode

HEADS, WIDTH = 32, 128
"""The shapes of Llama's layers."""
KERNELS = {"triton": flash_decode, "mosaic": hopper_decode}


Carry = tuple[jax.Array, ops.Stored, ops.Stored]
"""The sum of the outputs so far, and the cache."""


class Shape(NamedTuple):
  """The shape of a decode step: rows, KV heads, and slots of the cache, all filled."""

  batch: int
  kv_heads: int
  slots: int

  def cached(self, cache_dtype: str | None) -> list[ops.Stored]:
    """Random keys and values."""
    shape = self.batch, self.kv_heads, self.slots, WIDTH
    store = ops.FORMATS[cache_dtype].store if cache_dtype else lambda x: x
    return [store(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)) for seed in (3, 4)]


def measure(
  kernel: ModuleType, shape: Shape, cache_dtype: str | None, count: int, interpret: bool
) -> tuple[float, np.ndarray]:
  """Median seconds of one anchor kernel in a program with several, and the sum of their outputs."""
  batch, kv_heads, slots = shape
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
  q, key, value = normal(0, batch, HEADS, WIDTH), normal(1, batch, kv_heads, WIDTH), normal(2, batch, kv_heads, WIDTH)
  rows = ops.Rows(offset=jnp.full(batch, slots - 1, jnp.int32))
  how = flash_decode.How(WIDTH**-0.5)

  def steps(q: jax.Array, keys: ops.Stored, values: ops.Stored) -> Carry:
    def step(_: jax.Array, carry: Carry) -> Carry:
      out, _, (keys, values) = kernel.attend(q, (key, value), carry[1:], rows, how, interpret)
      return carry[0] + out.astype(jnp.float32), keys, values

    return jax.lax.fori_loop(0, count, step, (jnp.zeros(q.shape, jnp.float32), keys, values))

  cache = shape.cached(cache_dtype)
  compiled = jax.jit(steps, donate_argnums=(1, 2)).lower(q, *cache).compile()
  seconds = []
  for _ in range(6):
    begun = time.perf_counter()
    total, *cache = jax.block_until_ready(compiled(q, *cache))
    seconds.append((time.perf_counter() - begun) / count)
  return float(np.median(seconds[1:])), np.asarray(total)


def main() -> None:
  """Measures each shape with both."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
  parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 32])
  parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
  parser.add_argument("--cache-dtype", choices=["int8"], help="bfloat16 if not given")
  parser.add_argument("--steps", type=int, default=32, help="in one program")
  parser.add_argument("--interpret", action="store_true", help="on any device, slowly")
  parser.add_argument("--json", type=Path)
  given = parser.parse_args()
  found = []
  for batch, kv_heads, slots in itertools.product(given.batch_sizes, given.kv_heads, given.lengths):
    shape = Shape(batch, kv_heads, slots)
    how = given.cache_dtype, given.steps, given.interpret
    made = {name: measure(each, shape, *how) for name, each in KERNELS.items()}
    (triton, expected), (mosaic, total) = made.values()
    off = float(np.abs(total - expected).max() / np.abs(expected).max())
    cached = jax.eval_shape(lambda shape=shape: shape.cached(given.cache_dtype))
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cached))
    row = shape._asdict() | {"triton": triton, "mosaic": mosaic, "differ": off}
    found.append(row | {"bytes_per_second": read / mosaic})
  tell = lambda each: [
    *(str(each[name]) for name in ("batch", "kv_heads", "slots")),
    *(f"{1e6 * each[name]:.2f}" for name in KERNELS),
    f"{each['mosaic'] / each['triton']:.3f}",
    f"{each['differ']:.1e}",
  ]
  columns = ["rows", "key heads", "slots", *(f"{name}, µs" for name in KERNELS), "Mosaic's of Triton's", "differ by"]
  show_table(f"decode kernels, {jax.devices()[0].device_kind}, jax {jax.__version__}", columns, list(map(tell, found)))
  if given.json:
    given.json.write_text(
      json.dumps({"device": jax.devices()[0].device_kind, "cache_dtype": given.cache_dtype, "rows": found}, indent=1)
      + "\n"
    )


if __name__ == "__main__":
  main()
