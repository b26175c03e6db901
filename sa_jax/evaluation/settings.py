"""What is asked of a model by lm-eval's tasks, and how much at once."""

from __future__ import annotations

import dataclasses

from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Asking:
  """How tasks are asked.

  Raises:
    UserError: if a number is out of range.
  """

  num_fewshot: int | None = None
  """Examples before each question; the tasks' own numbers when None."""
  limit: int | None = None
  """Only the first documents of each task."""
  apply_chat_template: bool = False
  """Put prompts into the model's chat template, examples as turns of their own."""
  bootstrap_iters: int = 1000
  """Resamplings behind the standard errors of metrics that have no formula, such as F1; 0 for none."""
  log_samples: bool = False
  """Keep every request and answer in the results."""

  def __post_init__(self) -> None:
    _check({"num_fewshot": self.num_fewshot, "bootstrap_iters": self.bootstrap_iters}, 0)
    _check({"limit": self.limit}, 1)


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much a model reads and writes at once.

  Raises:
    UserError: if a number is out of range.
  """

  batch_tokens: int = 4096
  """Tokens scored at once; an accelerator wants some 65536."""
  slots: int = 32
  """Generations at once."""
  max_length: int | None = None
  """Most tokens that the model reads; the checkpoint's own context when None."""
  max_new_tokens: int = 256
  """Most tokens of a generation whose task does not say."""

  def __post_init__(self) -> None:
    _check(dataclasses.asdict(self), 1)


def _check(numbers: dict[str, int | None], least: int) -> None:
  wrong = {name: number for name, number in numbers.items() if number is not None and number < least}
  if wrong:
    raise UserError.of("evaluation", [f"`{name}` must be at least {least}, not {it}" for name, it in wrong.items()])
