"""What is asked of a model by lm-eval's tasks, and how much at once."""

from __future__ import annotations

import dataclasses

from sa_jax.fields import Count, Natural, check_fields


@dataclasses.dataclass(frozen=True)
class Asking:
  """How tasks are asked.

  Raises:
    UserError: if a number is out of range.
  """

  num_fewshot: Natural | None = None
  """Examples before each question; the tasks' own numbers when None."""
  limit: Count | None = None
  """Only the first documents of each task."""
  apply_chat_template: bool = False
  """Put prompts into the model's chat template, examples as turns of their own."""
  bootstrap_iters: Natural = 1000
  """Resamplings behind the standard errors of metrics that have no formula, such as F1; 0 for none."""
  log_samples: bool = False
  """Keep every request and answer in the results."""

  def __post_init__(self) -> None:
    check_fields(self, "evaluation")


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much a model reads and writes at once.

  Raises:
    UserError: if a number is out of range.
  """

  batch_tokens: Count = 4096
  """Tokens scored at once; an accelerator wants some 65536."""
  slots: Count = 32
  """Generations at once."""
  max_length: Count | None = None
  """Most tokens that the model reads; the checkpoint's own context when None."""
  max_new_tokens: Count = 256
  """Most tokens of a generation whose task does not say."""

  def __post_init__(self) -> None:
    check_fields(self, "evaluation")
