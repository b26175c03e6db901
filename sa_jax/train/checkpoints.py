"""A run's checkpoints: written asynchronously and atomically; only the newest are kept."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from sa_jax.distributed import wait_for_all
from sa_jax.errors import UserError
from sa_jax.files import move
from sa_jax.trees import Tree

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints in a folder, one per step: the train state, and JSON values with it.

  The state is stored as whole arrays, so it is restored on any mesh and any number of hosts.
  """

  def __init__(self, folder: Path, keep: int) -> None:
    """Opens or creates the folder, and removes unfinished checkpoints of a killed run.

    Args:
      folder: the checkpoints' folder.
      keep: number of newest checkpoints to keep.

    Raises:
      UserError: if the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    self._folder = folder.resolve()
    self._aside = self._folder.with_name(f"{self._folder.name}-damaged")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    with self._clear_errors("cannot be opened"):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._set_aside([step for step in self._found() if not self._is_whole(step)])
      self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "extra"))

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    try:
      self.wait()
    except ValueError as late:
      if error is None:
        raise
      _logger.error("%s", late)
    finally:
      self._manager.close()

  @property
  def latest(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def restore(
    self, like: Tree, check: Callable[[dict[str, Any]], None] = lambda extra: None
  ) -> tuple[int, Any, dict[str, Any]]:
    """Restores the newest readable checkpoint; unreadable ones are moved next to the folder, and logged.

    Args:
      like: the state as `jax.ShapeDtypeStruct`s with the wanted shardings.
      check: raises UserError if the JSON values are invalid.

    Returns:
      Its step, the state, and the JSON values.

    Raises:
      UserError: if none can be read, or their tree differs: reports the error of the newest.
    """
    import orbax.checkpoint as ocp

    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
    damaged: dict[int, UserError] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        with self._clear_errors(f"of step {step} cannot be read", step):
          read = self._manager.restore(step, args=wanted)
          check(read.extra)
      except UserError as error:
        damaged[step] = error
        continue
      for fault in damaged.values():
        _logger.warning("%s; using that of step %s, and moving the damaged one to %s", fault, step, self._aside)
      if damaged:
        self._set_aside(list(damaged))
        self._manager.reload()
      return step, read.state, read.extra
    raise next(iter(damaged.values()))

  def _found(self) -> list[int]:
    return [int(path.name) for path in self._folder.glob("*") if path.name.isdigit()]

  def _is_whole(self, step: int) -> bool:
    """Whether all parts of a checkpoint exist; their contents are not checked."""
    return all((self._folder / str(step) / part).is_dir() for part in ("state", "extra"))

  def _set_aside(self, steps: list[int]) -> None:
    """Moves invalid checkpoints away; removes empty folders."""
    if jax.process_index() == 0:
      for path in (self._folder / str(step) for step in steps):
        if not any(path.iterdir()):
          path.rmdir()
          continue
        move(path, self._aside / path.name)
    wait_for_all("set aside")

  def save(self, step: int, state: Tree, extra: dict[str, Any]) -> None:
    """Starts to write a checkpoint, unless that step has one; the state may be donated as soon as this returns.

    Raises:
      UserError: if it cannot be written, or writing the previous one failed.
    """
    import orbax.checkpoint as ocp

    if step == self.latest:
      return
    with self._clear_errors(f"of step {step} cannot be written"):
      self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
      )

  def check(self) -> None:
    """Raises ValueError if a pending write has failed."""
    with self._clear_errors("could not be written"):
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: if writing failed.
    """
    with self._clear_errors("could not be written"):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _clear_errors(self, what: str, of: int | None = None) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many types; all mean that the file system refused
      whole = sorted(step for step in self._found() if self._is_whole(step) and (of is None or step < of))
      last = f"the last complete one is of step {whole[-1]}" if whole else "there is no earlier one"
      system = re.search(r"([^:]+) \[os_error_code", str(error))
      lines = [system[1].strip()] if system else [line for line in str(error).splitlines() if line.strip()]
      reason = lines[0] if lines else type(error).__name__
      raise UserError(f"the checkpoint {what} in {self._folder}: {reason}; {last}") from error


def abstract(tree: Tree) -> Tree:
  """A tree of arrays as `jax.ShapeDtypeStruct`s with their shardings."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
