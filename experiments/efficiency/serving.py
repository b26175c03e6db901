"""Continuous batching as in a server, compared with static batches with the same cache size.

    python experiments/efficiency/serving.py --out gpu/h200/serving.json

Two loads, both in order of arrival and all available at the start:

* ``even``: 256 requests with 64 prompt tokens and 16 to 512 new ones, those of ``sa-jax bench batching``, in a cache of
  16 rows of 640 slots.
* ``mixed``: 64 requests with 64 prompt tokens, every fourth with 2048, and 16 to 256 new ones, in a cache of 16 rows of
  2304.

Static batches have 16 rows, with prompts padded to the longest in the batch, and wait for their longest answer; they
are timed once. A batcher has the same cache, in rows or in pages. In watched runs, every poll for new tokens is timed:
the time between two tokens of a request is the time between two polls divided by the tokens received. Writes after
every measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import sa_jax
from sa_jax.bench import device_name
from sa_jax.bench.ours import random_tree
from sa_jax.decode import Batcher, Engine, Prompts, Sampler, Serving
from sa_jax.sharding import abstract_params

TINY = sa_jax.ModelConfig(
  vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=48, max_length=4096
)


@dataclasses.dataclass(frozen=True)
class Load:
  """Requests.

  Attributes:
    name: the load's name.
    prompts: int32 ``[T]`` each.
    limits: new tokens per request.
    rows: rows of the static batches' cache.
    capacity: slots per row of it.
  """

  name: str
  prompts: list[np.ndarray]
  limits: list[int]
  rows: int
  capacity: int

  @classmethod
  def even(cls, vocab_size: int, requests: int) -> Load:
    """The requests of ``sa-jax bench batching``."""
    rng = np.random.default_rng(0)
    prompts = list(rng.integers(3, vocab_size, (requests, 64)).astype(np.int32))
    return cls("even", prompts, rng.integers(16, 513, requests).tolist(), 16, 640)

  @classmethod
  def mixed(cls, vocab_size: int, requests: int) -> Load:
    """Every fourth prompt is long."""
    rng = np.random.default_rng(1)
    lengths = [2048 if number % 4 == 3 else 64 for number in range(requests)]
    prompts = [rng.integers(3, vocab_size, length).astype(np.int32) for length in lengths]
    return cls("mixed", prompts, rng.integers(16, 257, requests).tolist(), 16, 2304)

  @property
  def steps(self) -> tuple[int, int]:
    """Decode steps of static batches in order of arrival, and of a batch of the same size that is always full."""
    after_first = [limit - 1 for limit in self.limits]  # the prompt's pass gives the first
    static = sum(max(after_first[first : first + self.rows]) for first in range(0, len(after_first), self.rows))
    return static, math.ceil(sum(after_first) / self.rows)


class Variant(NamedTuple):
  """A way to serve a load; None for static batches."""

  load: Load
  how: Serving | None
  watched: bool = False


class Run(NamedTuple):
  """One run of a variant: total seconds, and seconds between tokens."""

  seconds: float
  between: np.ndarray


def static(model: sa_jax.Transformer, params: dict, load: Load) -> Run:
  """One static batch after the other."""
  engine, start = Engine(model), time.perf_counter()
  for first in range(0, len(load.prompts), load.rows):
    rows = slice(first, first + load.rows)
    length, limits = max(map(len, load.prompts[rows])), load.limits[rows]
    batch = Prompts.of(load.prompts[rows], length, limits)
    state = engine.prefill(params, batch, sampler=Sampler(), capacity=load.capacity)
    steps, width = np.int32(max(limits) - 1), load.capacity
    jax.block_until_ready(engine.decode(params, state, sampler=Sampler(), steps=steps, width=width))
  return Run(time.perf_counter() - start, np.zeros(0))


def serve(model: sa_jax.Transformer, params: dict, variant: Variant) -> Run:
  """All requests through a batcher."""
  load = variant.load
  assert variant.how is not None
  start = time.perf_counter()
  batcher = Batcher(model, params, variant.how)
  requests = [batcher.submit(prompt, limit) for prompt, limit in zip(load.prompts, load.limits, strict=True)]
  between, seen = [], {}
  if variant.watched:
    while batcher.busy:
      news, now = batcher.step(), time.perf_counter()
      for request, tokens in news.items():
        if tokens and request in seen:
          between += [(now - seen[request]) / len(tokens)] * len(tokens)
        if tokens:
          seen[request] = now
  else:
    batcher.run()
  seconds = time.perf_counter() - start
  assert [len(request.tokens) for request in requests] == load.limits
  return Run(seconds, np.array(between))


def variants(requests: tuple[int, int], vocab_size: int) -> list[Variant]:
  """The variants to measure, most important first."""
  even, mixed = Load.even(vocab_size, requests[0]), Load.mixed(vocab_size, requests[1])
  paged = {load.name: {"capacity": load.capacity, "cache_slots": load.rows * load.capacity} for load in (even, mixed)}
  in_rows = Serving(slots=even.rows, capacity=even.capacity)
  in_pages = lambda slots, **more: Serving(slots=slots, **paged["even"], **more)
  of_mixed = lambda **more: Serving(slots=mixed.rows, **paged["mixed"], **more)
  return [
    Variant(even, None),
    Variant(even, in_pages(32, together=4)),
    Variant(even, dataclasses.replace(in_rows, longest_first=True)),
    Variant(even, in_pages(32)),
    Variant(even, in_pages(32, together=4, chunk=1), watched=True),
    Variant(mixed, None),
    *(Variant(mixed, of_mixed(chunk=1, read=read), watched=True) for read in (None, 512, 256, 1024)),
    *(Variant(mixed, of_mixed(read=read)) for read in (None, 512)),
    Variant(even, in_rows),
    Variant(even, in_pages(32, together=8)),
    Variant(even, in_pages(32, together=4, chunk=8), watched=True),
    Variant(even, in_pages(16)),
    Variant(even, dataclasses.replace(in_rows, together=2)),
  ]


def measured(run: Callable[[], Run], repeats: int, tokens: int) -> dict:
  """Statistics of several runs."""
  runs = [run() for _ in range(repeats)]
  seconds = sorted(each.seconds for each in runs)
  between = np.concatenate([each.between for each in runs])
  median = float(np.median(seconds))
  numbers = {"seconds": median, "low": seconds[0], "high": seconds[-1], "tokens_per_second": tokens / median}
  if between.size:
    p50, p99 = np.percentile(between, [50, 99])
    numbers |= {"between": {"p50": float(p50), "p99": float(p99), "longest": float(between.max())}}
  return numbers


def main() -> None:
  """Measures, prints, and writes the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="llama-3-8b", help="a preset, or tiny")
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--requests", type=int, nargs=2, default=(256, 64), help="of even, of mixed")
  parser.add_argument("--loads", nargs="+", default=["even", "mixed"], choices=["even", "mixed"])
  parser.add_argument("--repeats", type=int, default=2)
  parser.add_argument("--seconds", type=float, default=600, help="begin nothing after so many")
  parser.add_argument("--out", type=Path, required=True)
  arguments = parser.parse_args()
  start = time.perf_counter()
  preset = TINY if arguments.model == "tiny" else sa_jax.ModelConfig.preset(arguments.model)
  layers = min(arguments.layers, preset.num_layers)
  config = dataclasses.replace(preset, num_layers=layers, eos_token_ids=())
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(layers))
  params = random_tree(abstract_params(model, layout="layers"))
  known = variants(tuple(arguments.requests), config.vocab_size)
  wanted = [variant for variant in known if variant.load.name in arguments.loads]
  steps = {variant.load.name: variant.load.steps for variant in wanted}
  print(f"decode steps of static batches, and of as many rows that are always full: {steps}", flush=True)
  told = {"device": device_name(), "model": arguments.model, "layers": layers, "steps": steps, "rows": []}
  of_static = {}
  for variant in wanted:
    if time.perf_counter() - start > arguments.seconds:
      break
    load, tokens = variant.load, sum(variant.load.limits)
    if variant.how is None:
      run, repeats = functools.partial(static, model, params, load), 1
    else:
      run, repeats = functools.partial(serve, model, params, variant), arguments.repeats
    run()  # compiles
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    row = measured(run, repeats, tokens)
    of_static.setdefault(load.name, row["seconds"])
    how = None if variant.how is None else dataclasses.asdict(variant.how)
    row |= {"load": load.name, "requests": len(load.prompts), "how": how, "watched": variant.watched}
    told["rows"].append(row | {"against_static": of_static[load.name] / row["seconds"]})
    print(json.dumps(told["rows"][-1]), flush=True)
    arguments.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
