"""1,000 random requests with continuous batching, each compared with its result alone.

    python experiments/efficiency/load.py

Prompts of 1 to 2,000 tokens, random limits, four end tokens out of 61, 16 slots in pages for 10 of the longest, chunks
of 512 prompt tokens, a tiny model, CPU. Every tenth request is cancelled while it runs or waits, and every fiftieth
needs more than the cache holds. Expected: 0 differences, every oversized request refused, every slot free at the end.
Prints one line, and exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import numpy as np
from rich.progress import track

import sa_jax
from sa_jax.decode import Batcher, Serving
from sa_jax.sharding import abstract_params

LONGEST_PROMPT, LONGEST_ANSWER, CAPACITY = 2000, 32, 2048


def tiny_model(rng: np.random.Generator) -> tuple[sa_jax.Transformer, dict]:
  """A random model of three layers, including one follower, that sometimes generates an end token."""
  config = sa_jax.ModelConfig(
    vocab_size=61, embed_dim=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
    max_length=CAPACITY, eos_token_ids=(7, 19, 23, 42), attention="blockwise",
  )  # fmt: skip
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.parse("0:1", 3))
  shapes = abstract_params(model, layout="layers")
  return model, jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def main() -> int:
  """Runs the load; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--requests", type=int, default=1000)
  count = parser.parse_args().requests
  rng = np.random.default_rng(0)
  model, params = tiny_model(rng)
  params = jax.device_put(params)
  prompts = [rng.integers(0, 61, rng.integers(1, LONGEST_PROMPT + 1)).astype(np.int32) for _ in range(count)]
  limits = rng.integers(1, LONGEST_ANSWER + 1, count).tolist()

  start = time.perf_counter()
  how = Serving(slots=16, capacity=CAPACITY, cache_slots=10 * CAPACITY, chunk=4, together=2, read=512)
  batcher = Batcher(model, params, how)
  requests, refused = [], 0
  for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
    if index % 50 == 49:
      try:
        batcher.submit(np.zeros(CAPACITY, np.int32), 2)
      except ValueError:
        refused += 1
    requests.append(batcher.submit(prompt, limit))
  steps = 0
  while batcher.busy:
    batcher.step()
    steps += 1
    for request in requests[::10]:
      if request.status == "running" and rng.random() < 0.5:
        batcher.cancel(request)
  seconds = time.perf_counter() - start

  different = 0
  for prompt, limit, request in track(list(zip(prompts, limits, requests, strict=True)), "alone"):
    out = sa_jax.generate(model, params, prompt[None], None, LONGEST_ANSWER, cache_length=CAPACITY)
    alone = out.tokens[0, : out.lengths[0]].tolist()[:limit]
    got = request.tokens
    different += got != alone[: len(got)] if request.status == "cancelled" else got != alone
  done, cancelled = (sum(r.status == status for r in requests) for status in ("done", "cancelled"))
  print(
    f"{count} requests in {seconds:.0f} s and {steps} chunks: {done} done, {cancelled} cancelled, "
    f"{refused} of {count // 50} oversized refused, {different} differ from what they get alone"
  )
  return int(different > 0 or done + cancelled != count or refused != count // 50)


if __name__ == "__main__":
  sys.exit(main())
