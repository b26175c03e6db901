"""Benchmarks of the board's mixtures, with keys and values rounded as in their caches; see README.md in this folder."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import numpy as np
from board import Board, Made, add_flags

from sa_jax import ops
from sa_jax.analysis import walk
from sa_jax.analysis.mixture import Mixture
from sa_jax.config import CacheDtype, ModelConfig
from sa_jax.evaluation.harness import metrics, run_tasks
from sa_jax.evaluation.lm import SharedAttentionLM
from sa_jax.evaluation.scoring import Scored
from sa_jax.evaluation.settings import Asking
from sa_jax.nn import PlannedTransformer
from sa_jax.nn.typed import apply
from sa_jax.plan import SharingPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "direct_application"))
from tasks import write_tasks

TASKS = ("hellaswag", "arc_easy")
CACHES: dict[str, CacheDtype] = {"bfloat16": None, "int8": "int8", "int4": "int4"}


@functools.partial(jax.jit, static_argnames="config")
def _scores(config: ModelConfig, params: Any, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For each token after a row's first: its log-likelihood, and whether it is the most likely."""
  logits = apply(PlannedTransformer(config), params, PlannedTransformer.read, x)[:, :-1]
  return ops.token_log_likelihoods(logits, tokens[:, 1:]), logits.argmax(axis=-1) == tokens[:, 1:]


class Walked:
  """Scores continuations given their contexts, by walking the model; see `sa_jax.evaluation.scoring.Scorer`.

  Args:
    config: with the cache dtype.
    params: from `whole`.
    plan: the model's.
    batch_tokens: tokens per batch.
  """

  def __init__(self, config: ModelConfig, params: Any, plan: SharingPlan, batch_tokens: int):
    self.config, self.params, self.plan, self.batch_tokens = config, params, plan, batch_tokens
    self.outside = {name: value for name, value in params.items() if name != "layers"}

  def __call__(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], report: Callable[[int, int], None]
  ) -> list[Scored]:
    """Scores pairs of a context's and its continuation's tokens."""
    found: dict[int, Scored] = {}
    sizes: dict[int, list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
      sizes.setdefault(max(64, 1 << (len(context) + len(continuation) - 1).bit_length()), []).append(number)
    for size, numbers in sizes.items():
      rows = max(1, self.batch_tokens // size)
      for begin in range(0, len(numbers), rows):
        batch = numbers[begin : begin + rows]
        tokens = np.zeros((rows, size), np.int32)
        for row, number in enumerate(batch):
          both = [*pairs[number][0], *pairs[number][1]]
          tokens[row, : len(both)] = both
        stream = walk.start(self.config, self.params, tokens, rows)
        (chunk,) = walk.through(self.config, self.params, self.plan, stream)
        likely, greedy = jax.device_get(_scores(self.config, self.outside, chunk.x, tokens))
        for row, number in enumerate(batch):
          context, continuation = pairs[number]
          part = slice(len(context) - 1, len(context) + len(continuation) - 1)
          found[number] = Scored(float(likely[row, part].sum(dtype=np.float64)), bool(greedy[row, part].all()))
        report(len(found), len(pairs))
    return [found[number] for number in range(len(pairs))]


class WalkedLM(SharedAttentionLM):
  """lm-eval's model, with keys and values rounded as in a cache."""

  def __init__(self, board: Board, made: Made, cache_dtype: CacheDtype):
    super().__init__(made.model, made.params, board.tokenizer)
    config = dataclasses.replace(board.config, cache_dtype=cache_dtype)
    params = walk.whole(made.params, board.params)
    self._walked = Walked(config, params, made.model.plan, board.flags.batch_tokens)

  @property
  def _scorer(self) -> Walked:  # type: ignore[override]
    return self._walked


def main() -> None:
  """Refits, evaluates and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  add_flags(parser)
  add = parser.add_argument
  add("--mixtures", nargs="+", default=["0:64:bfloat16"], help="FOLLOWERS:VALUES:CACHE, such as 8:48:int4")
  add("--limit", type=int, help="documents of each task")
  add("--batch-tokens", type=int, default=16384)
  add("--work", type=Path, default=Path("build/tasks"), help="documents and YAML, written anew")
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  write_tasks(flags.data / "eval", flags.work)
  board = Board(flags)
  plans = {0: board.model.plan} | {len(plan.followers): plan for plan in board.plans()}
  done = board.stored.setdefault("tasks", {})
  for text in flags.mixtures:
    followers, values, cache = text.split(":")
    value_dim = None if int(values) == board.config.value_width else int(values)
    mixture = Mixture(plans[int(followers)], value_dim, CACHES[cache])
    row = done.setdefault(text, {"mixture": str(mixture), "part": mixture.part(board.model.config)})
    for task in TASKS:
      if task in row:
        continue
      lm, begun = WalkedLM(board, board.refitted(mixture), mixture.cache_dtype), time.perf_counter()
      results = run_tasks(lm, [task], Asking(limit=flags.limit), include=[flags.work])
      row[task] = {
        "metrics": [each._asdict() for each in metrics(results)],
        "limit": flags.limit,
        "seconds": time.perf_counter() - begun,
      }
      shown = "  ".join(f"{each['metric']} {100 * each['value']:.1f}" for each in row[task]["metrics"])
      board.say(f"{mixture}: {task} {shown}")
      board.save()


if __name__ == "__main__":
  main()
