"""``sa-jax eval``: EleutherAI's lm-eval on a model, under a plan."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import console, exact_float32, is_first, show_table, write_json
from sa_jax.cli.opening import Opening
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError
from sa_jax.files import check_writable, make_folder


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluate a model on tasks of lm-eval, or on local ones."""

  model: tyro.conf.Positional[Path]
  """A Hugging Face folder, a GGUF file or an sa_jax checkpoint."""
  tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")]
  """Tasks, groups or patterns, such as: hellaswag gsm8k mmlu_*."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the checkpoint's own plan."""
  include_path: tuple[Path, ...] = ()
  """Folders of local tasks, which hide lm-eval's own of the same name."""
  num_fewshot: int | None = None
  """Examples before each question; the tasks' own numbers when None."""
  limit: int | None = None
  """Only the first documents of each task."""
  apply_chat_template: bool = False
  """Put prompts into the model's chat template."""
  bootstrap_iters: int = 1000
  """Resamplings behind the standard errors of metrics that have no formula, such as F1; 0 for none."""
  batch_tokens: int = 4096
  """Tokens scored at once; an accelerator wants some 65536."""
  slots: int = 32
  """Generations at once."""
  max_length: int | None = None
  """Most tokens that the model reads; the checkpoint's own context when None."""
  dtype: FloatDtype | None = None
  """Type of parameters and activations; None for the checkpoint's."""
  opening: Opening = Opening()
  """Model."""
  log_samples: bool = False
  """Keep every request and answer in the results."""
  output_path: Path | None = None
  """Folder for a results file in lm-eval's format, named by lm-eval."""
  json: Path | None = None
  """Also write lm-eval's results to this file."""

  @property
  def exact(self) -> bool:
    """Whether it computes in float32, as far as flags tell."""
    return self.dtype == "float32"

  def run(self) -> None:
    """Prints a row a metric."""
    try:
      import lm_eval  # noqa: F401
    except ImportError as error:
      raise UserError(f"lm-eval is not installed ({error}): pip install 'sa-jax[eval]'") from None
    from sa_jax.evaluation.harness import find_tasks, metrics, run_tasks
    from sa_jax.evaluation.lm import SharedAttentionLM

    for name in ("limit", "batch_tokens", "slots", "max_length"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise UserError(f"`{name}` must be at least 1, not {value}")
    if self.bootstrap_iters < 0:
      raise UserError(f"`bootstrap_iters` must not be negative, not {self.bootstrap_iters}")
    check_writable(self.json)
    if self.output_path is not None:
      make_folder(self.output_path)
    self.opening.begin()
    find_tasks(self.tasks, self.include_path)
    model, params = self.opening.open(self.model, self.plan, self.dtype)
    lm = SharedAttentionLM(
      model,
      params,
      self.opening.tokenizer(self.model),
      name=str(self.model),
      batch_tokens=self.batch_tokens,
      slots=self.slots,
      max_length=self.max_length,
    )
    start = time.perf_counter()
    with exact_float32(model.config.dtype):
      results = run_tasks(
        lm,
        self.tasks,
        include=self.include_path,
        num_fewshot=self.num_fewshot,
        limit=self.limit,
        apply_chat_template=self.apply_chat_template,
        bootstrap_iters=self.bootstrap_iters,
        model_args={"pretrained": str(self.model), "plan": str(model.plan), "dtype": model.config.dtype},
        log_samples=self.log_samples,
        output_path=self.output_path if is_first() else None,
      )
    if not is_first():  # the first process has the results
      return
    show_table(
      f"{self.model.name}, plan {model.plan}, {time.perf_counter() - start:.1f} s",
      ["task", "documents", "metric", "value", "± standard error"],
      [
        [each.task, str(each.samples), each.metric, f"{each.value:.4f}", f"{each.stderr:.4f}" if each.stderr else ""]
        for each in metrics(results)
      ],
    )
    write_json(self.json, results)
    if self.output_path is not None:
      console.print(f"results in lm-eval's format: {self.output_path}")
