"""Metric writers: the terminal, JSON lines, TensorBoard, Weights & Biases, or the user's own."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sa_jax.durations import duration
from sa_jax.errors import UserError
from sa_jax.files import named, new_file
from sa_jax.storage import Mirrored


class Writer(Protocol):
  """Receives metrics. After resuming, steps after the checkpoint are written again."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the metrics of a step; some may not be finite."""
    ...

  def close(self) -> None:
    """Closes the writer; nothing is written afterwards."""
    ...


class JsonLines:
  """``metrics.jsonl``: objects with ``step`` and numbers, null for non-finite ones."""

  def __init__(self, folder: Path, start: int, say: Callable[[str], None] = lambda text: None) -> None:
    """Opens the file; removes damaged lines, and steps after ``start``, which are written again.

    Raises:
      UserError: if it cannot be written.
    """
    path = folder / "metrics.jsonl"
    self._mirror = Mirrored(folder)
    written = self._mirror.local / path.name
    with named(path, "write"):
      if damaged := _keep_until(path, start, written):
        say(f"{path}: {damaged} damaged {'line' if damaged == 1 else 'lines'} left out")
      self._file = written.open("a", encoding="utf-8")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a line immediately.

    Raises:
      UserError: if it cannot be written.
    """
    line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
    with named(Path(self._file.name), "write"):
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
    self._mirror.push()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
    self._mirror.close()


def _keep_until(path: Path, step: int, written: Path) -> int:
  """Drops damaged lines and those of later steps; ``written`` is replaced atomically.

  Returns:
    The number of damaged lines, except the last one, which may be unfinished because the process was killed.
  """
  if not path.exists():
    return 0
  kept, damaged = [], 0
  *whole, unfinished = path.read_bytes().split(b"\n")
  for line in [*whole, *[unfinished] * bool(unfinished)]:
    try:
      values = json.loads(line)
    except (ValueError, RecursionError):
      values = None
    at = values.get("step") if isinstance(values, dict) else None
    if isinstance(at, int) and at <= step:
      kept.append(line + b"\n")
    damaged += not isinstance(at, int) and line is not unfinished
  with new_file(written) as file:
    file.write_bytes(b"".join(kept))
  return damaged


class _SummaryWriter(Protocol):
  def add_scalar(self, name: str, value: float, step: int) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """Writes TensorBoard files to ``tensorboard/``, by tensorboardX."""

  def __init__(self, folder: Path, start: int) -> None:
    """Opens a file.

    Raises:
      UserError: if tensorboardX is missing.
    """
    try:
      made = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError as error:
      raise UserError(
        f"TensorBoard's files need tensorboardX ({error}): pip install 'sa-jax[train]', or `tensorboard=False`"
      ) from None
    self._mirror = Mirrored(folder / "tensorboard")
    self._writer: _SummaryWriter = made(str(self._mirror.local), purge_step=start + 1 if start else None)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)
    self._mirror.push()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()
    self._mirror.close()


class WeightsAndBiases:
  """A run on Weights & Biases (package ``wandb``), continued when the folder's run is resumed."""

  def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
    """Starts or resumes the run.

    Args:
      folder: the run's folder; its name is shown, and ``wandb.txt`` in it stores the run's id.
      project: the Weights & Biases project.
      config: shown with the run.

    Raises:
      UserError: if wandb is missing or fails.
    """
    try:
      self._wandb = importlib.import_module("wandb")
    except ImportError as error:
      raise UserError(f"Weights & Biases needs its package ({error}): pip install 'sa-jax[wandb]'") from None
    self._mirror = Mirrored(folder)
    kept = folder / "wandb.txt"
    known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
    try:
      self._run = self._wandb.init(
        project=project, name=folder.name, dir=str(self._mirror.local), id=known, resume="allow", config=dict(config)
      )
    except Exception as error:  # wandb's own types: no key, no network
      raise UserError(f"Weights & Biases rejected the run: {error}") from None
    kept.write_text(f"{self._run.id}\n", encoding="utf-8")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs them."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Finishes the run."""
    self._run.finish()
    self._mirror.close()


class Screen:
  """Prints a line per set of metrics; in a terminal or a notebook also a progress bar below."""

  def __init__(self, console: Console, steps: int, start: int) -> None:
    """Starts the bar.

    Args:
      console: the output; text printed to it also appears above the bar.
      steps: total steps of the run.
      start: the step to resume from, 0 for a new run.
    """
    self._console, self._steps = console, steps
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    self._bar = Progress(
      *columns, console=console, transient=True, disable=not (console.is_interactive or console.is_jupyter)
    )
    self._task = self._bar.add_task("", total=steps, completed=start)
    self._bar.start()

  def advance(self, step: int) -> None:
    """Advances the bar."""
    self._bar.update(self._task, completed=step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Prints a line."""
    shown = {name: value for name, value in values.items() if name in _SHOWN and (name, value) != ("seconds_left", 0)}
    text = "  ".join(_SHOWN[name](value) for name, value in shown.items())
    # A file or a pipe has no width, so lines are not wrapped.
    wide = not self._console.is_terminal
    self._console.print(f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=wide)

  def close(self) -> None:
    """Removes the bar."""
    self._bar.stop()


def _number(value: float, digits: int) -> str:
  """Such as ``1.14`` and ``1,140``; with an exponent only if it is very large or small."""
  return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.{digits}g}"


_SHOWN: dict[str, Callable[[float], str]] = {
  "loss": lambda value: f"loss {value:.4f}",
  "grad_norm": lambda value: f"gradient {_number(value, 3)}",
  "learning_rate": lambda value: f"learning rate {value:.3g}",
  "tokens_trained": lambda value: f"{value:,.0f} tokens trained",
  "tokens_per_second": lambda value: f"{value:,.0f} tokens/s" if value >= 10 else f"{value:.2g} tokens/s",
  "mfu": lambda value: f"MFU {100 * value:.1f} %",
  "skipped": lambda value: f"{value:.0f} steps skipped",
  "seconds_left": lambda value: f"{duration(value)} left",
  "eval_loss": lambda value: f"evaluation loss {value:.4f}",
  "eval_perplexity": lambda value: f"perplexity {_number(value, 4)}",
}


@contextlib.contextmanager
def closing(writers: Sequence[Writer]) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Yields a function that writes to all writers; closes them at the end, even after errors."""
  with contextlib.ExitStack() as stack:
    for writer in writers:
      stack.callback(writer.close)

    def write(step: int, values: Mapping[str, float]) -> None:
      for writer in writers:
        writer.write(step, values)

    yield write
