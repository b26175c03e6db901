"""What a run says of itself: a line on the terminal, JSON lines, TensorBoard."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.errors import UserError
from sa_jax.files import named, write_text
from sa_jax.plan import SharingPlan

PEAK_TFLOPS = {
  "NVIDIA A100": 312.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5p": 459.0,
  "TPU v5": 459.0,
  "TPU v6 lite": 918.0,
}
"""Dense bfloat16 rates that makers state, by the beginning of a device's name."""


def peak_tflops(stated: float | None) -> float | None:
  """The peak rate of one device: as stated, or else its known one."""
  name = jax.devices()[0].device_kind
  return stated or next((rate for start, rate in PEAK_TFLOPS.items() if name.startswith(start)), None)


def train_flops(config: ModelConfig, plan: SharingPlan, rows: int, length: int) -> int:
  """Model FLOPs of a step: forward, and twice that backward; nothing that is computed again counts."""
  return 3 * cost(config, plan, rows, length).flops


@dataclasses.dataclass
class Window:
  """Sums over the steps since the last line of metrics.

  Attributes:
    loss: sum of losses of the tokens.
    weight: of how many tokens.
    seen: tokens since training began.
    skipped: steps that changed nothing, since training began.
    in_row: how many of them just now.
  """

  loss: float = 0.0
  weight: float = 0.0
  seen: float = 0.0
  skipped: int = 0
  in_row: int = 0

  def add(self, loss: float, weight: float, finite: bool) -> None:
    """Counts a step."""
    if finite:
      self.loss += loss * weight
      self.weight += weight
      self.seen += weight
    self.skipped += not finite
    self.in_row = 0 if finite else self.in_row + 1

  def close(self) -> float:
    """The mean loss since the last call, NaN if there was none."""
    mean = self.loss / self.weight if self.weight else math.nan
    self.loss = self.weight = 0.0
    return mean


class Recorder:
  """Writes metrics; only the first process does.

  JSON lines have ``step`` and numbers. On resuming, lines of steps after the checkpoint go: they come again.
  """

  def __init__(self, folder: Path, steps: int, start: int, *, tensorboard: bool = True) -> None:
    """Opens the files.

    Args:
      folder: for ``metrics.jsonl`` and ``tensorboard/``.
      steps: of the whole run.
      start: the step that is resumed from, 0 for a new run.
      tensorboard: whether to write TensorBoard's files.

    Raises:
      UserError: if the package tensorboardX is missing, or the folder cannot be written.
    """
    self._active = jax.process_index() == 0
    screen = Console(stderr=True)
    columns = (
      TextColumn("training"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.description}"),
    )
    self._bar = Progress(*columns, console=screen, transient=True, disable=not (screen.is_terminal and self._active))
    self._task = self._bar.add_task("", total=steps, completed=start)
    self._console = Console(highlight=False, soft_wrap=True)
    self._writer: Any = None
    if not self._active:
      return
    if tensorboard:
      try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
      except ImportError as error:
        raise UserError(
          f"TensorBoard's files need tensorboardX ({error}): pip install 'sa-jax[train]', or `tensorboard=False`"
        ) from None
      self._writer = writer(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
    path = folder / "metrics.jsonl"
    with named(path, "write"):
      _keep_until(path, start)
      self._file = path.open("a", encoding="utf-8")

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._bar.stop()
    if self._active:
      self._file.close()
    if self._writer is not None:
      self._writer.close()

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    self._bar.update(self._task, completed=step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a line of metrics.

    Raises:
      UserError: if it cannot be written.
    """
    if not self._active:
      return
    line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
    with named(Path(self._file.name), "write"):
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
    if self._writer is not None:
      for name, value in values.items():
        self._writer.add_scalar(name, value, step)
    text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
    self._bar.update(self._task, description=text)
    if self._bar.disable or "eval_loss" in values:
      self._console.print(f"step {step}  {text}")


class Clock:
  """Seconds a step, without what is not training, and without the first step, which compiles."""

  def __init__(self) -> None:
    self._since: float | None = None
    self._steps = 0

  def tick(self) -> None:
    """Counts a step."""
    if self._since is None:
      self._since = time.perf_counter()
    else:
      self._steps += 1

  def pause(self, seconds: float) -> None:
    """Takes time out of the count."""
    if self._since is not None:
      self._since += seconds

  def lap(self) -> float | None:
    """Seconds a step since the last call; None if none was counted."""
    if self._since is None or not self._steps:
      return None
    now = time.perf_counter()
    mean = (now - self._since) / self._steps
    self._since, self._steps = now, 0
    return mean


def _keep_until(path: Path, step: int) -> None:
  """Drops lines of later steps, and one that a kill left unfinished; the file changes at once or not at all."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      values = json.loads(line)
    except json.JSONDecodeError:
      continue
    if values["step"] <= step:
      kept.append(line + "\n")
  write_text(path, "".join(kept))


def _short(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
