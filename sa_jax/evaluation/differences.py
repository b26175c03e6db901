"""How plans change lm-eval's results, with standard errors of the differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sa_jax.evaluation.harness import Metric, Results, metrics

Documents = Mapping[tuple[str, int, str], float]
"""For one task and metric: each document's value, by task, number and digest."""


class Difference(NamedTuple):
  """The difference of a metric between two plans.

  Attributes:
    value: the difference.
    stderr: its standard error, or None if lm-eval gives none for one of the two.
    paired: whether it is computed from differences per document, over the same documents. Then most of the variation
      between documents cancels.
  """

  value: float
  stderr: float | None
  paired: bool


def differences(base: Results, other: Results) -> dict[tuple[str, str], Difference]:
  """Differences by task and metric, for those that both results have.

  Args:
    base: lm-eval's results with samples.
    other: the same under another plan.
  """
  before = {(each.task, each.metric): each for each in metrics(base)}
  found = {}
  for metric in metrics(other):
    if (old := before.get((metric.task, metric.metric))) is not None:
      found[metric.task, metric.metric] = _paired(base, other, old, metric) or _apart(old, metric)
  return found


def _apart(old: Metric, new: Metric) -> Difference:
  stderr = None if old.stderr is None or new.stderr is None else math.hypot(old.stderr, new.stderr)
  return Difference(new.value - old.value, stderr, paired=False)


def _paired(base: Results, other: Results, old: Metric, new: Metric) -> Difference | None:
  """None if the documents differ, or a metric is not the mean over its documents."""
  documents = [dict(_documents(results, metric)) for results, metric in ((base, old), (other, new))]
  if documents[0].keys() != documents[1].keys() or len(documents[0]) < 2:
    return None
  values = [np.array([each[key] for key in documents[0]]) for each in documents]
  if any(not math.isclose(found.mean(), each.value, abs_tol=1e-9) for found, each in zip(values, (old, new))):
    return None
  by_task: dict[str, list[float]] = {}
  for (task, _, _), before, after in zip(documents[0], *values, strict=True):
    by_task.setdefault(task, []).append(after - before)
  # Variances within tasks are pooled as in lm-eval.
  squares = sum(float(np.var(each)) * len(each) for each in by_task.values())
  count = len(documents[0])
  if count == len(by_task):
    return None
  return Difference(new.value - old.value, math.sqrt(squares / (count - len(by_task)) / count), paired=True)


def _documents(results: Results, metric: Metric) -> Iterator[tuple[tuple[str, int, str], float]]:
  """The documents of a task, or of all tasks in a group."""
  name, _, filtered = metric.metric.partition(", ")
  for task in sorted(_leaves(results, metric.task)):
    for sample in results.get("samples", {}).get(task, ()):
      if sample["filter"] == (filtered or "none") and isinstance(
        value := sample.get(name), bool | int | float | np.generic
      ):
        yield (task, sample["doc_id"], sample["doc_hash"]), float(value)


def _leaves(results: Results, name: str) -> set[str]:
  members = results.get("group_subtasks", {}).get(name, ())
  return set().union(*(_leaves(results, member) for member in members)) if members else {name}
