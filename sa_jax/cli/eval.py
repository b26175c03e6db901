"""``sa-jax eval``: EleutherAI's lm-eval on a model, under one or more plans."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax.cli.common import console, exact_float32, is_first, markdown, plans_asked, show_table, write_json
from sa_jax.cli.opening import Opening
from sa_jax.cli.progress import progress
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError
from sa_jax.evaluation.settings import Asking, Limits
from sa_jax.files import check_writable, make_folder, write_text

if TYPE_CHECKING:
  from sa_jax.evaluation.answers import Answers
  from sa_jax.evaluation.differences import Difference
  from sa_jax.evaluation.harness import Results
  from sa_jax.nn import Transformer


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluate a model on lm-eval tasks or local tasks."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id such as org/model."""
  tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")]
  """Tasks, groups or patterns, such as: hellaswag gsm8k mmlu_*."""
  plan: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLAN ...")] = ()
  """One or more plans, such as: dense 26:27-28; the first is the baseline for the others. None for the checkpoint's
  own."""
  include_path: tuple[Path, ...] = ()
  """Folders of local tasks, which take precedence over lm-eval's tasks of the same name."""
  how: Annotated[Asking, tyro.conf.arg(name="prompt")] = Asking()
  """How to ask."""
  limits: Annotated[Limits, tyro.conf.arg(name="batch and limit")] = Limits()
  """Batch sizes and limits."""
  dtype: FloatDtype | None = None
  """Type of parameters and activations; None for the checkpoint's."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  output_path: Path | None = None
  """Folder for a results file in lm-eval's format, named by lm-eval."""
  resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
  """Store answers in this folder, and reuse those of the same model, plan and dtype."""
  markdown: Path | None = None
  """Also write the table to this file, as Markdown."""
  json: Path | None = None
  """Also write lm-eval's results to this file; for several plans, by plan, with the differences."""

  @property
  def exact(self) -> bool:
    """Whether the flags select float32."""
    return self.dtype == "float32"

  def run(self) -> None:
    """Prints one row per metric and plan."""
    try:
      import lm_eval  # noqa: F401
    except ImportError as error:
      raise UserError(f"lm-eval is not installed ({error}): pip install 'sa-jax[eval]'") from None
    from sa_jax.evaluation.differences import differences
    from sa_jax.evaluation.harness import find_tasks
    from sa_jax.formats.load import describe

    self._check()
    self.opening.begin()
    find_tasks(self.tasks, self.include_path)
    start = time.perf_counter()
    models = [describe(self.model, plan, self.dtype, revision=self.opening.revision) for plan in plans_asked(self.plan)]
    names = [plan or str(model.plan) for plan, model in zip(plans_asked(self.plan), models, strict=True)]
    asked = dict(zip(names, models, strict=True))
    digest = self._digest()
    found = {name: self._evaluate(model, self._answers(model, digest)) for name, model in asked.items()}
    if not is_first():  # the first process has the results
      return
    base, *others = found
    changed = {name: differences(found[base], found[name]) for name in others}
    plans = ", ".join(asked) if others else f"plan {models[0].plan}"
    title = f"{self.model.name}, {plans}, {time.perf_counter() - start:.1f} s"
    columns, rows = _table(found, changed)
    show_table(title, columns, rows)
    if any(not each.paired for of in changed.values() for each in of.values()):
      console.print("* not paired: the metric is not a mean over documents, or the documents differ")
    if self.markdown is not None:
      write_text(self.markdown, markdown(title, columns, rows))
    shown = {name: self._without_samples(results) for name, results in found.items()}
    flat = [
      {"plan": name, "than": base, "task": task, "metric": metric, **each._asdict()}
      for name, of in changed.items()
      for (task, metric), each in of.items()
    ]
    write_json(self.json, {"plans": shown, "differences": flat} if others else shown[base])
    if self.output_path is not None:
      console.print(f"results in lm-eval's format: {self.output_path}")

  def _check(self) -> None:
    if len(set(self.plan)) < len(self.plan):
      raise UserError(f"`plan` lists a plan twice: {' '.join(self.plan)}")
    for file in (self.json, self.markdown):
      check_writable(file)
    for folder in (self.output_path, self.resume):
      if folder is not None:
        make_folder(folder)

  def _digest(self) -> str | None:
    """The key of the model's stored answers."""
    if self.resume is None:
      return None
    import jax

    from sa_jax.evaluation.answers import fingerprint
    from sa_jax.formats.source import open_source

    if jax.process_count() > 1:
      raise UserError(f"`resume` works with one process, but there are {jax.process_count()}")
    with progress(f"reading {self.model.name}"):
      return fingerprint(open_source(self.model, self.opening.revision).path)

  def _answers(self, model: Transformer, digest: str | None) -> Answers | None:
    """The stored answers of the model under its plan."""
    if self.resume is None:
      return None
    import sa_jax
    from sa_jax.evaluation.answers import answers_in

    answers = answers_in(
      self.resume,
      {
        "model": digest,
        "plan": str(model.plan),
        "head_map": model.plan.head_map,
        "dtype": model.config.dtype,
        "max_length": self.limits.max_length or model.config.max_length,
        "sa_jax": sa_jax.__version__,
      },
    )
    console.print(f"plan {model.plan}: {len(answers)} answers stored in {answers.path}")
    return answers

  def _evaluate(self, model: Transformer, answers: Answers | None) -> Results:
    """lm-eval's results under the model's plan; weights are read only if needed."""
    from lm_eval.loggers import EvaluationTracker

    from sa_jax.evaluation.harness import run_tasks, save_results
    from sa_jax.evaluation.lm import SharedAttentionLM
    from sa_jax.storage import Mirrored

    lm = SharedAttentionLM(
      model,
      lambda: self.opening.open(self.model, model.plan, self.dtype)[1],
      self.opening.tokenizer(self.model),
      answers=answers,
      name=str(self.model),
      limits=self.limits,
      progress=progress,
    )
    written = Mirrored(self.output_path) if self.output_path and is_first() else None
    tracker = None if written is None else EvaluationTracker(output_path=str(written.local))
    with exact_float32(model.config.dtype):
      results = run_tasks(
        lm,
        self.tasks,
        dataclasses.replace(self.how, log_samples=self.how.log_samples or len(self.plan) > 1),
        include=self.include_path,
        model_args={"pretrained": str(self.model), "plan": str(model.plan), "dtype": model.config.dtype},
        tracker=tracker,
      )
    if tracker is not None and written is not None:
      save_results(tracker, self._without_samples(results))
      written.close()
    return results

  def _without_samples(self, results: Results) -> Results:
    """The results, without samples unless requested."""
    return results if self.how.log_samples else {key: value for key, value in results.items() if key != "samples"}


def _table(
  found: dict[str, Results], changed: dict[str, dict[tuple[str, str], Difference]]
) -> tuple[list[str], list[list[str]]]:
  """Columns, and one row per task, metric and plan; without difference columns if there are no differences."""
  from sa_jax.evaluation.harness import metrics

  columns = ["task", "documents", "metric", "plan", "value", "± standard error", "difference", "± standard error"]
  by_plan = {plan: list(metrics(results)) for plan, results in found.items()}
  rows = []
  for at, first in enumerate(next(iter(by_plan.values()))):
    for plan, of in by_plan.items():
      each = of[at]
      row = [each.task, str(each.samples), each.metric, plan, f"{each.value:.4f}", _error(each.stderr)]
      if (apart := changed.get(plan, {}).get((first.task, first.metric))) is not None:
        row += [f"{apart.value:+.4f}", _error(apart.stderr) + ("" if apart.paired else " *")]
      rows.append(row + [""] * (len(columns) - len(row)))
  if not changed:
    return [*columns[:3], *columns[4:6]], [[*row[:3], *row[4:6]] for row in rows]
  return columns, rows


def _error(value: float | None) -> str:
  return f"{value:.4f}" if value else ""
