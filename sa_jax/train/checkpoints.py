"""A run's checkpoints: written while training goes on, kept in number, whole or not there at all."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from sa_jax.errors import UserError
from sa_jax.trees import Tree

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints in a folder, one a step: the train state, and JSON values beside it.

  The state is stored as whole arrays, so it is restored on any mesh and any number of hosts.
  """

  def __init__(self, folder: Path, keep: int) -> None:
    """Opens or makes the folder; what a killed run left unfinished in it is removed.

    Args:
      folder: where they are.
      keep: how many of the newest stay.

    Raises:
      UserError: if the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    self._folder = folder.resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    with self._clear_errors("cannot be opened"):
      self._folder.mkdir(parents=True, exist_ok=True)
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
    """The step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def restore(self, like: Tree) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint.

    Args:
      like: the state as `jax.ShapeDtypeStruct`s with the shardings that it is to have.

    Returns:
      The state, and the JSON values beside it.

    Raises:
      UserError: if it is damaged, or holds another tree.
    """
    import orbax.checkpoint as ocp

    with self._clear_errors(f"of step {self.latest} cannot be read"):
      read = self._manager.restore(
        self.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
      )
    return read.state, read.extra

  def save(self, step: int, state: Tree, extra: dict[str, Any]) -> None:
    """Starts to write a checkpoint, if there is none of that step; the state may be donated as soon as this returns.

    Raises:
      UserError: if it cannot be written, or the one before could not.
    """
    import orbax.checkpoint as ocp

    if step == self.latest:
      return
    with self._clear_errors(f"of step {step} cannot be written"):
      self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
      )

  def check(self) -> None:
    """Raises ValueError if writing failed in the meantime."""
    with self._clear_errors("could not be written"):
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: if it could not be.
    """
    with self._clear_errors("could not be written"):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _clear_errors(self, what: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that the file system refused
      whole = sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdigit())
      last = f"the last whole one is of step {whole[-1]}" if whole else "there is no earlier one"
      system = re.search(r"([^:]+) \[os_error_code", str(error))
      lines = [system[1].strip()] if system else [line for line in str(error).splitlines() if line.strip()]
      reason = lines[0] if lines else type(error).__name__
      raise UserError(f"the checkpoint {what} in {self._folder}: {reason}; {last}") from error


def abstract(tree: Tree) -> Tree:
  """A tree of arrays as `jax.ShapeDtypeStruct`s with their shardings."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
