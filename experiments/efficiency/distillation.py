"""Speed of distilling SmolLM2-135M under a plan from the dense model: rows of 512 tokens, random weights.

python distillation.py --json gpu/h200/distillation.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sa_jax import ModelConfig, SharingPlan, Transformer
from sa_jax.bench.measure import H100_PEAK
from sa_jax.bench.ours import random_tree
from sa_jax.cli.common import show_table
from sa_jax.config import RematPolicy
from sa_jax.costs import cost
from sa_jax.sharding import abstract_params
from sa_jax.train import OptimizerConfig, make_optimizer
from sa_jax.train.batch import Batch
from sa_jax.train.objective import distill
from sa_jax.train.step import make_state, make_step

PLAN = "5:6-7,11:12,14:15,21:22,24:25,26:27-28"


class Variant(NamedTuple):
  """Attributes:
  remat: what the student's backward pass recomputes.
  layout: the parameters' layout: ``runs`` are scanned, ``layers`` are not.
  packed: whether rows hold several documents.
  """

  remat: RematPolicy = "dots"
  layout: str = "runs"
  packed: bool = False


VARIANTS = {
  "everything kept": Variant("none"),
  "products and attention kept": Variant(),
  "the same, no loop over layers": Variant(layout="layers"),
  "packed rows": Variant(packed=True),
}


def measure(how: Variant, rows: int, length: int, repeats: int) -> dict[str, float]:
  """One variant: seconds per step, and derived numbers."""
  config = dataclasses.replace(ModelConfig.preset("smollm2-135m"), dtype="bfloat16", param_dtype="float32")
  plan = SharingPlan.parse(PLAN, config.num_layers)
  student = Transformer(dataclasses.replace(config, remat=how.remat), plan)
  teacher = Transformer(config, SharingPlan.dense(config.num_layers))
  make = lambda model: random_tree(abstract_params(model, layout=how.layout))
  frozen, trained = make(teacher), make(student)
  frozen |= {how.layout: jax.tree.map(lambda leaf: leaf.astype("bfloat16"), frozen[how.layout])}
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (rows, length), np.int32)
  learnt = np.ones(tokens.shape, np.float32)
  learnt[:, 0] = 0
  documents = np.sort(rng.integers(1, 5, tokens.shape), axis=1).astype(np.int32) if how.packed else None
  batch = jax.device_put(Batch(tokens, learnt, documents))
  optimizer = make_optimizer(OptimizerConfig(), total_steps=1000)
  state = make_state(optimizer, trained, donate=True)
  start = time.perf_counter()
  step = make_step(distill(student, teacher, alpha=1.0), optimizer).lower(state, frozen, batch).compile()
  compiling = time.perf_counter() - start
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    for _ in range(10):
      state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    seconds.append((time.perf_counter() - start) / 10)
  median = sorted(seconds[1:])[repeats // 2]
  learning, teaching = 3 * cost(config, plan, rows, length).flops, cost(config, None, rows, length).flops
  memory = step.memory_analysis()
  return {
    "milliseconds": 1e3 * median,
    "low": 1e3 * min(seconds[1:]),
    "high": 1e3 * max(seconds[1:]),
    "tokens_per_second": rows * length / median,
    "mfu_of_student": learning / median / H100_PEAK,
    "mfu_with_teacher": (learning + teaching) / median / H100_PEAK,
    "temporaries_gb": memory.temp_size_in_bytes / 1e9 if memory else float("nan"),
    "compile_seconds": compiling,
  }


def main() -> None:
  """Measures each variant."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--repeats", type=int, default=5, help="times of ten steps")
  parser.add_argument("--json", type=Path)
  given = parser.parse_args()
  device = jax.devices()[0].device_kind
  found = {name: measure(VARIANTS[name], given.rows, given.length, given.repeats) for name in given.variants}
  tell = lambda value: f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"
  rows = [[name, *map(tell, each.values())] for name, each in found.items()]
  show_table(f"distilling SmolLM2-135M, {device}, jax {jax.__version__}", ["", *next(iter(found.values()))], rows)
  if given.json:
    given.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "variants": found}, indent=2) + "\n")


if __name__ == "__main__":
  main()
