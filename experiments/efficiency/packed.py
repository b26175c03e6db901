"""Attention over packed rows on an NVIDIA GPU: `flash`, `reference`, and cuDNN if rows are one document.

    python experiments/efficiency/packed.py

Milliseconds, medians of 5 times 5 calls, bfloat16: SmolLM2-135M's heads over 32 rows of 512, Llama-3-8B's over 2 of
4096.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.bench import timed
from sa_jax.cli.common import show_table

SHAPES = ((32, 512, 9, 3, 64), (2, 4096, 32, 8, 128))
DOCUMENTS = 6
CALLS = 5


def milliseconds(call: Callable[[], Any]) -> float:
  """The median time of a call, without compilation."""
  return 1e3 * timed(lambda: [call() for _ in range(CALLS)], repeats=5, warmup=1).median / CALLS


def main() -> None:
  """Times every backend that supports the call."""
  argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
  rows = []
  for batch, length, heads, kv_heads, head_dim in SHAPES:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
      jax.random.normal(key, (batch, length, n, head_dim), jnp.bfloat16)
      for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    documents = np.sort(np.random.default_rng(0).integers(0, DOCUMENTS, (batch, length)), axis=1)
    for label, segments in ((f"{DOCUMENTS} documents a row", jnp.asarray(documents, jnp.int32)), ("one", None)):
      seen = ops.Rows(segments=segments)
      for backend in ("flash", "cudnn", "reference"):
        if ops.backends[backend].refusal(jax.default_backend(), q, seen, ops.AttentionSpec()) or (
          backend == "reference" and length > 1024  # its weights would be gigabytes
        ):
          continue
        attend = functools.partial(ops.attend, rows=seen, backend=backend)
        forward = functools.partial(jax.jit(attend), q, k, v)
        both = functools.partial(
          jax.jit(lambda q, k, v, d, attend=attend: jax.vjp(attend, q, k, v)[1](d)), q, k, v, d_out
        )
        rows.append([f"{q.shape}, {label}", backend, f"{milliseconds(forward):.3f}", f"{milliseconds(both):.3f}"])
  show_table(f"attention, {jax.devices()[0].device_kind}", ["", "backend", "forward, ms", "forward and backward"], rows)


if __name__ == "__main__":
  main()
