"""The record of a search: plans measured so far, kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sa_jax.distributed import broadcast_text
from sa_jax.errors import UserError
from sa_jax.files import as_path, read_text, write_text
from sa_jax.plan import SharingPlan

_VALUES = " values "


def key_of(plan: SharingPlan, value_dim: int | None) -> str:
  """A plan's key in the record, including the size of values."""
  return str(plan) if value_dim is None else f"{plan}{_VALUES}{value_dim}"


def _are_losses(plans: object, texts: int) -> bool:
  """Whether a record's plans have one loss per text."""
  return isinstance(plans, dict) and all(
    isinstance(losses, list) and len(losses) == texts and all(isinstance(loss, float) for loss in losses)
    for losses in plans.values()
  )


class Record:
  """The plans measured so far, in memory and, if a file is given, on disk after each one.

  Args:
    path: a JSON file, or None.
    settings: what was measured and how; a file with different settings is rejected.

  Raises:
    UserError: if the file is unreadable or has different settings.
  """

  def __init__(self, path: Path | None, settings: dict[str, Any]):
    path = None if path is None else as_path(path)
    self._path, self._settings = path, json.loads(json.dumps(settings))
    self.plans: dict[str, list[float]] = {}
    # Only the first process reads and writes: processes that know different plans would diverge.
    read = lambda: read_text(path) if path is not None and path.exists() else ""
    if text := broadcast_text("the record", read):
      try:
        stored = json.loads(text)
        settings, self.plans = stored["settings"], stored["plans"]
      except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not the record of a search; use another file, or remove it") from None
      if settings != self._settings:
        raise UserError(f"{path} records a search with different settings, {settings}; use another file, or remove it")
      if not _are_losses(self.plans, len(self._settings["texts"])):
        raise UserError(f"{path} is damaged: its plans must have one loss per text; use another file, or remove it")

  def get(self, plan: str) -> np.ndarray | None:
    """The plan's losses, or None if it has not been measured."""
    losses = self.plans.get(plan)
    return None if losses is None else np.array(losses)

  def measured(self, num_layers: int) -> dict[SharingPlan, np.ndarray]:
    """Every plan with full-width values, and its losses."""
    plain = {plan: losses for plan, losses in self.plans.items() if _VALUES not in plan}
    return {SharingPlan.parse(plan, num_layers): np.array(losses) for plan, losses in plain.items()}

  def add(self, plan: str, losses: np.ndarray) -> None:
    """Records a plan's losses."""
    self.plans[plan] = [float(loss) for loss in losses]
    if self._path is not None and jax.process_index() == 0:
      write_text(self._path, json.dumps({"settings": self._settings, "plans": self.plans}, indent=1))
