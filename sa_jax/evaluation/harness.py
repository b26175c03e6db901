"""Runs EleutherAI's lm-eval on an sa_jax model: tasks by name, results in lm-eval's format."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sa_jax.errors import UserError
from sa_jax.evaluation import patches
from sa_jax.evaluation.settings import Asking
from sa_jax.files import check_local

if TYPE_CHECKING:
  from lm_eval.loggers import EvaluationTracker
  from lm_eval.tasks import TaskManager

  from sa_jax.evaluation.lm import SharedAttentionLM


Results = dict[str, Any]
"""lm-eval's results, with its names."""


class Metric(NamedTuple):
  """One metric of a task or group.

  Attributes:
    task: the task's name.
    samples: number of documents.
    metric: the metric's name, with lm-eval's filter if there is one.
    value: the value.
    stderr: its standard error, or None if lm-eval gives none.
  """

  task: str
  samples: int | None
  metric: str
  value: float
  stderr: float | None


def find_tasks(names: Sequence[str], include: Sequence[Path] = ()) -> tuple[TaskManager, list[str]]:
  """Tasks, groups and tags by name or pattern, from local folders and lm-eval.

  Args:
    names: such as ``hellaswag`` or ``mmlu_*``.
    include: folders of YAML files; their tasks take precedence over lm-eval's of the same name.

  Returns:
    lm-eval's task manager, and the names found.

  Raises:
    UserError: if a folder does not exist or a name is unknown; suggests similar names.
  """
  from lm_eval.tasks import TaskManager

  if not names:
    raise UserError("at least one task is needed (`tasks`), such as hellaswag")
  for folder in include:
    check_local(folder, "a folder of tasks")
  if missing := [str(folder) for folder in include if not folder.is_dir()]:
    raise UserError(f"there is no folder {', '.join(missing)} to read tasks from")
  matches: dict[str, list[str]] = {}
  # Reading lm-eval's thousands of tasks takes seconds, and local ones may suffice.
  for defaults in (False, True) if include else (True,):
    manager = TaskManager(include_path=list(include), include_defaults=defaults)
    matches = {name: manager.match_tasks([name]) for name in names}
    if all(matches.values()):
      return manager, list(dict.fromkeys(task for found in matches.values() for task in found))
  unknown = []
  for name in (name for name in names if not matches[name]):
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    unknown.append(f"{name!r}" + (f" (near names: {', '.join(near)})" if near else ""))
  raise UserError(f"lm-eval does not know the tasks {', '.join(unknown)}; it knows {len(manager.all_tasks)} others")


def run_tasks(
  lm: SharedAttentionLM,
  names: Sequence[str],
  how: Asking = Asking(),
  *,
  include: Sequence[Path] = (),
  model_args: dict[str, str] | None = None,
  tracker: EvaluationTracker | None = None,
) -> Results:
  """Evaluates a model on tasks.

  Args:
    lm: the model.
    names: see `find_tasks`.
    how: the task settings; 1000 bootstrap samples give standard errors to 2 %, lm-eval's 100,000 take minutes per task.
    include: see `find_tasks`.
    model_args: model information for the results.
    tracker: records the evaluation; see `save_results`.

  Returns:
    The result of ``lm_eval.simple_evaluate``.

  Raises:
    UserError: if a task is unknown or its data are unreadable.
  """
  import lm_eval.evaluator
  from datasets.exceptions import DatasetsError

  manager, found = find_tasks(names, include)
  # lm-eval warns about each overridden setting.
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  try:
    with patches.quick():
      results = lm_eval.evaluator.simple_evaluate(
        lm,
        model_args=model_args,
        tasks=found,
        task_manager=manager,
        **dataclasses.asdict(how),
        evaluation_tracker=tracker,
        torch_random_seed=None,
      )
  except (DatasetsError, ConnectionError, FileNotFoundError) as error:
    raise UserError(f"the data of {', '.join(found)} cannot be read: {error}") from error
  assert results is not None, "every process is the first to lm-eval"
  return dict(results)


def save_results(tracker: EvaluationTracker, results: Results) -> None:
  """Writes results, and samples if included, to the tracker's folder, in files named by lm-eval."""
  samples = results.get("samples", {})
  tracker.save_results_aggregated({key: value for key, value in results.items() if key != "samples"}, samples)
  for task, each in samples.items():
    tracker.save_results_samples(task, each)


def metrics(results: Results) -> Iterator[Metric]:
  """The metrics in lm-eval's results: first of groups, then of tasks outside them."""
  groups: Results = results.get("groups", {})
  members = {name for group in groups for name in results.get("group_subtasks", {}).get(group, ())}
  tasks = {name: values for name, values in results["results"].items() if name not in {*groups, *members}}
  counts = results.get("n-samples", {})

  def samples_of(name: str) -> int:
    """For a group, the sum over its members, which may be groups."""
    if name in counts:
      return counts[name]["effective"]
    return sum(map(samples_of, results.get("group_subtasks", {}).get(name, ())))

  for name, values in (groups | tasks).items():
    samples = samples_of(name)
    for key, value in values.items():
      metric, _, filtered = key.partition(",")
      if not filtered or metric.endswith("_stderr"):
        continue
      stderr = values.get(f"{metric}_stderr,{filtered}")
      label = metric if filtered == "none" else f"{metric}, {filtered}"
      yield Metric(name, samples, label, float(value), stderr if isinstance(stderr, float) else None)
