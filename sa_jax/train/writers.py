"""Where a run's metrics go: the screen, JSON lines, TensorBoard, Weights & Biases, or what a user has written."""

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
  """Takes metrics. On resuming, steps after the checkpoint come again."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Takes the metrics of a step; some may not be finite."""
    ...

  def close(self) -> None:
    """Ends: nothing is written after this."""
    ...


class JsonLines:
  """``metrics.jsonl``: objects with ``step`` and numbers, null for those that are not finite."""

  def __init__(self, folder: Path, start: int, say: Callable[[str], None] = lambda text: None) -> None:
    """Opens the file; lines of steps after ``start`` go, since they come again, and those that are damaged.

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
    """Writes a line, at once.

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
  """Drops lines of later steps, and damaged ones; the file that goes on in ``written`` changes at once or not at all.

  Returns:
    How many were damaged, but for the last, which a kill may have left unfinished.
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
  """TensorBoard's files, by tensorboardX, in ``tensorboard/``."""

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
  """A run at Weights & Biases (package ``wandb``), which the same folder goes on with when it is resumed."""

  def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
    """Starts or resumes the run.

    Args:
      folder: the run's, whose name is shown; ``wandb.txt`` in it keeps the run's id.
      project: of Weights & Biases.
      config: shown beside the run.

    Raises:
      UserError: if wandb is missing, or refuses.
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
    except Exception as error:  # wandb's own kinds: no key, no network
      raise UserError(f"Weights & Biases refuses the run: {error}") from None
    kept.write_text(f"{self._run.id}\n", encoding="utf-8")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs them."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Ends the run there."""
    self._run.finish()
    self._mirror.close()


class Screen:
  """A line for each of the metrics' lines, which stays; in a terminal or a notebook with a bar below it."""

  def __init__(self, console: Console, steps: int, start: int) -> None:
    """Starts the bar.

    Args:
      console: what is written to; whoever writes to it too writes above the bar.
      steps: of the whole run.
      start: the step that is resumed from, 0 for a new run.
    """
    self._console, self._steps = console, steps
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    self._bar = Progress(
      *columns, console=console, transient=True, disable=not (console.is_interactive or console.is_jupyter)
    )
    self._task = self._bar.add_task("", total=steps, completed=start)
    self._bar.start()

  def advance(self, step: int) -> None:
    """Moves the bar."""
    self._bar.update(self._task, completed=step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Prints a line."""
    text = "  ".join(_SHOWN[name](value) for name, value in values.items() if name in _SHOWN)
    # A file or a pipe has no width: there a line is one line.
    wide = not self._console.is_terminal
    self._console.print(f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=wide)

  def close(self) -> None:
    """Takes the bar away."""
    self._bar.stop()


_SHOWN: dict[str, Callable[[float], str]] = {
  "loss": lambda value: f"loss {value:.4f}",
  "grad_norm": lambda value: f"gradient {value:.3g}",
  "learning_rate": lambda value: f"learning rate {value:.3g}",
  "tokens_learnt": lambda value: f"{value:,.0f} tokens learnt",
  "tokens_per_second": lambda value: f"{value:,.0f} tokens/s" if value >= 10 else f"{value:.2g} tokens/s",
  "mfu": lambda value: f"MFU {100 * value:.1f} %",
  "skipped": lambda value: f"{value:.0f} steps skipped",
  "seconds_left": lambda value: f"{duration(value)} left",
  "eval_loss": lambda value: f"evaluation loss {value:.4f}",
  "eval_perplexity": lambda value: f"perplexity {value:,.4g}",
}


@contextlib.contextmanager
def closing(writers: Sequence[Writer]) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Yields what writes to all of them; they are closed at the end, whatever happens."""
  with contextlib.ExitStack() as stack:
    for writer in writers:
      stack.callback(writer.close)

    def write(step: int, values: Mapping[str, float]) -> None:
      for writer in writers:
        writer.write(step, values)

    yield write
