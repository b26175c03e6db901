"""Settings of lm-eval tasks."""

from __future__ import annotations

import dataclasses

from sa_jax.fields import Count, Natural, check_fields


@dataclasses.dataclass(frozen=True)
class Asking:
  """How tasks are run.

  Raises:
    UserError: if a number is out of range.
  """

  num_fewshot: Natural | None = None
  """Number of few-shot examples; None for the tasks' own."""
  limit: Count | None = None
  """Use only this many documents of each task."""
  apply_chat_template: bool = False
  """Apply the model's chat template to prompts, with few-shot examples as separate turns."""
  bootstrap_iters: Natural = 1000
  """Bootstrap samples for standard errors of metrics without a formula, such as F1; 0 for none."""
  log_samples: bool = False
  """Include every request and answer in the results."""

  def __post_init__(self) -> None:
    check_fields(self, "evaluation")


@dataclasses.dataclass(frozen=True)
class Limits:
  """Batch sizes and length limits.

  Raises:
    UserError: if a number is out of range.
  """

  batch_tokens: Count = 4096
  """Tokens per scoring batch; about 65536 suits an accelerator."""
  slots: Count = 32
  """Concurrent generations."""
  max_length: Count | None = None
  """Maximum context in tokens; None for the checkpoint's own."""
  max_new_tokens: Count = 256
  """Maximum number of generated tokens, if the task does not set one."""

  def __post_init__(self) -> None:
    check_fields(self, "evaluation")
