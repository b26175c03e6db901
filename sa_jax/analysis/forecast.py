"""How long `sa_jax.analysis.share` will take: its work is counted, and its speed is that of its first stage.

What is counted is FLOPs of matrix products, with what the layers before a plan's first follower save by the half. What
compiles comes on top, which on a GPU is most of the time with a small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sa_jax.analysis import search
from sa_jax.analysis.judge import Text
from sa_jax.analysis.share import READING, SCORING_DENSE, Effort, Search, refits, rows_at_once
from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.display import Progress
from sa_jax.durations import duration
from sa_jax.plan import SharingPlan


class Counts(NamedTuple):
  """What a search for a plan does.

  Attributes:
    pairs: of an anchor and a follower whose cost is estimated.
    plans: that are measured, or walked to go on from.
  """

  pairs: int
  plans: int

  @classmethod
  def of(cls, config: ModelConfig, followers: int, how: Search) -> Counts:
    """Of a search for a plan with so many followers; at most, where plans are measured once only."""
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
  """FLOPs of each part of the work, of which the first is the stage that comes first.

  Args:
    config: the dense model.
    texts: to fit to and to judge by.
    wanted: how many followers the plan shall have, or the plan itself, when nothing is searched.
    effort: how much work.
    chunk: rows computed at once.
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
  # A pair's heads are compared with each other, and its error is weighed: as much time as two layers take.
  estimates = counts.pairs * few * (2 * block + of_heads)
  estimates += 3 * few * (layers * block + head) if counts.pairs else 0  # the gradients that pairs are weighed by
  refit = fit * ((2 * layers - first) * block + followers * (of_heads + maps))
  # The hidden activations are computed once for the sums, and once more with the new weights.
  hidden = 4 * length * config.embed_dim * config.mlp_dim
  refit += fit * (layers - first) * (sums(config.mlp_dim) + hidden) if recovery.mlp else 0
  # Forward, backward, and the anchor's weights once more for its followers.
  local = 4 * fit * min(2 * followers, layers) * block
  made = refits(recovery, fit, rows_at_once(chunk))
  refit = sum(refit + each.local_epochs * local for each in made)
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


def foretold(flops: dict[str, float], stage: search.Stage, say: Callable[[str], None]) -> search.Stage:
  """A stage that says how long all of it will take, once the first part is done.

  Args:
    flops: as `work` counts.
    stage: what is told besides.
    say: takes the text.
  """
  first = next(iter(flops))
  begun: list[tuple[float, int]] = []

  def begin(name: str) -> Progress:
    report = stage(name)
    if name != first:
      return report

    def timed(done: int, total: int) -> None:
      report(done, total)
      begun.append((time.monotonic(), done))
      since, before = begun[0]  # with a compilation in it
      if before < done == total == len(begun):
        seconds = (time.monotonic() - since) / (total - before) * total / flops[first]
        parts = {part: count * seconds for part, count in flops.items() if part != first}
        shown = ", ".join(f"{part} {duration(each)}" for part, each in parts.items())
        say(f"about {duration(sum(parts.values()))}, and what compiles: {shown}")

    return timed

  return begin
