"""Running EleutherAI's lm-eval on an sa_jax model: tasks by name, results in its own format."""

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
"""What lm-eval returns, by the names that it gives to its parts."""


class Metric(NamedTuple):
  """One number of a task or group.

  Attributes:
    task: its name.
    samples: how many documents it is over.
    metric: its name, with lm-eval's filter where there is one.
    value: the number.
    stderr: its standard error, or None where lm-eval gives none.
  """

  task: str
  samples: int | None
  metric: str
  value: float
  stderr: float | None


def find_tasks(names: Sequence[str], include: Sequence[Path] = ()) -> tuple[TaskManager, list[str]]:
  """Tasks, groups and tags by name or pattern, of local folders and of lm-eval itself.

  Args:
    names: such as ``hellaswag`` or ``mmlu_*``.
    include: folders of YAML files; their tasks hide lm-eval's own of the same name.

  Returns:
    lm-eval's task manager, and the names found.

  Raises:
    UserError: if a folder does not exist or a name is unknown; near names are offered.
  """
  from lm_eval.tasks import TaskManager

  if not names:
    raise UserError("at least one task is needed (`tasks`), such as hellaswag")
  for folder in include:
    check_local(folder, "a folder of tasks")
  if missing := [str(folder) for folder in include if not folder.is_dir()]:
    raise UserError(f"there is no folder {', '.join(missing)} to read tasks from")
  matches: dict[str, list[str]] = {}
  # Reading lm-eval's thousands of tasks takes seconds, and local ones may be all that is asked for.
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
    how: a thousand resamplings tell standard errors to 2 %; lm-eval's own 100,000 take minutes a task.
    include: see `find_tasks`.
    model_args: what the results say about the model.
    tracker: is told what is evaluated; see `save_results`.

  Returns:
    What ``lm_eval.simple_evaluate`` returns.

  Raises:
    UserError: if a task is unknown or its data cannot be read.
  """
  import lm_eval.evaluator
  from datasets.exceptions import DatasetsError

  manager, found = find_tasks(names, include)
  # lm-eval warns of each setting that it was told to change.
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
  """Writes results, and samples if they are among them, to the tracker's folder in files that lm-eval names."""
  samples = results.get("samples", {})
  tracker.save_results_aggregated({key: value for key, value in results.items() if key != "samples"}, samples)
  for task, each in samples.items():
    tracker.save_results_samples(task, each)


def metrics(results: Results) -> Iterator[Metric]:
  """The numbers of lm-eval's results: of groups first, then of the tasks that belong to no group of them."""
  groups: Results = results.get("groups", {})
  members = {name for group in groups for name in results.get("group_subtasks", {}).get(group, ())}
  tasks = {name: values for name, values in results["results"].items() if name not in {*groups, *members}}
  counts = results.get("n-samples", {})

  def samples_of(name: str) -> int:
    """Of a group, those of its members, which may be groups."""
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
