"""A time estimate for `sa_jax.analysis.share`: counted FLOPs at the speed measured in its first stage.

Only FLOPs of matrix products are counted; skipping the layers before a plan's first follower is assumed to save half a
walk. Compilation comes on top; on a GPU with a small model it takes most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sa_jax.analysis import search
from sa_jax.analysis.share import READING, SCORING_DENSE, Effort, Search, refits, rows_at_once
from sa_jax.analysis.texts import Text
from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.display import Progress
from sa_jax.durations import duration
from sa_jax.plan import SharingPlan


class Counts(NamedTuple):
  """The amount of work in a plan search.

  Attributes:
    pairs: anchor-follower pairs whose cost is estimated.
    plans: plans that are measured, or walked as the base of later ones.
  """

  pairs: int
  plans: int

  @classmethod
  def of(cls, config: ModelConfig, followers: int, how: Search) -> Counts:
    """Counts a search for a plan with this many followers; an upper bound if no plan is measured twice."""
    layers, step = config.num_layers, how.width if how.strategy == "beam" else 1
    near = lambda layer: range(max(0, layer - how.reach), layer)
    pairs = sum(config.may_follow(layer, anchor) for layer in range(1, layers) for anchor in near(layer))
    if how.strategy == "spans":
      return cls(0, len(list(search.late_spans(config, followers))))
    if how.strategy == "dp":
      return cls(pairs, 1 + how.swaps)
    candidates = [how.shortlist or step * (layers - 1 - count) for count in range(followers)]
    return cls(pairs if how.shortlist else 0, 1 + sum(candidates) + step * (followers - 1))


def work(
  config: ModelConfig, texts: Sequence[Text], wanted: int | SharingPlan, effort: Effort, chunk: int
) -> dict[str, float]:
  """FLOPs of each part of the work; the first is the stage that runs first.

  Args:
    config: the dense model.
    texts: calibration and held-out rows.
    wanted: the number of followers, or the plan itself if there is no search.
    effort: the effort settings.
    chunk: rows per batch.
  """
  layers, length = config.num_layers, texts[0].judging.shape[1]
  followers = wanted if isinstance(wanted, int) else len(wanted.followers)
  first = 1 if isinstance(wanted, int) else min(wanted.followers, default=layers)
  fit, few = (
    sum(min(len(text.calibration), rows) for text in texts)
    for rows in (effort.most_rows, min(effort.most_rows, effort.search.search_rows or effort.most_rows))
  )
  judging = sum(len(text.judging) for text in texts)
  head = 2 * length * config.vocab_size * config.embed_dim
  block = (cost(config, None, 1, length).flops - head) / layers
  sums = lambda features: 2 * length * features * (features + config.embed_dim)
  of_heads = sums(config.num_heads * config.value_width)
  counts, recovery = Counts.of(config, followers, effort.search), effort.recovery(config)
  maps = sums(config.num_heads * config.num_kv_heads * config.value_width) if recovery.maps else 0
  walk = (few + judging) * layers * block
  # Per pair: heads are compared and the error is weighted, which takes as long as two layers.
  estimates = counts.pairs * few * (2 * block + of_heads)
  estimates += 3 * few * (layers * block + head) if counts.pairs else 0  # the gradients that pairs are weighed by
  refit = fit * ((2 * layers - first) * block + followers * (of_heads + maps))
  # The hidden activations are computed once for the sums, and again with the new weights.
  hidden = 4 * length * config.embed_dim * config.mlp_dim
  refit += fit * (layers - first) * (sums(config.mlp_dim) + hidden) if recovery.mlp else 0
  # All groups from the first follower's on: forward and backward passes, and a walk with the new weights.
  local = lambda epochs: (3 * epochs + 1) * fit * (layers - first + 1) * block if epochs else 0
  made = refits(recovery, fit, rows_at_once(chunk))
  refit = sum(refit + local(each.local_epochs) for each in made)
  score = layers * block + head
  scoring = (1 + len(made)) * judging * score
  if not isinstance(wanted, int):
    dense = judging * score
    return {SCORING_DENSE: dense, "refit": refit, "scoring": scoring - dense}
  return {
    READING: walk + judging * head,
    "search": estimates + counts.plans * (walk / 2 + judging * head + few * followers / 2 * of_heads),
    "refit": refit,
    "scoring": scoring,
  }


def with_estimates(flops: dict[str, float], stage: search.Stage, say: Callable[[str], None]) -> search.Stage:
  """A stage callback that reports the total time after the first part.

  Args:
    flops: the result of `work`.
    stage: the wrapped callback.
    say: receives the message.
  """
  first = next(iter(flops))
  marks: list[tuple[float, int]] = []

  def begin(name: str) -> Progress:
    report = stage(name)
    if name != first:
      return report

    def timed(done: int, total: int) -> None:
      report(done, total)
      marks.append((time.monotonic(), done))
      since, before = marks[0]  # includes compilation
      if before < done == total == len(marks):
        seconds = (time.monotonic() - since) / (total - before) * total / flops[first]
        parts = {part: count * seconds for part, count in flops.items() if part != first}
        shown = ", ".join(f"{part} {duration(each)}" for part, each in parts.items())
        say(f"{duration(sum(parts.values()))} estimated, plus compilation ({shown})")

    return timed

  return begin
