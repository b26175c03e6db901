"""A run's folder: the run that owns it, its contents, and a lock against a second process."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import filelock
import jax

from sa_jax.config import RematChoice
from sa_jax.distributed import broadcast_number, run_on_first, wait_for_all
from sa_jax.errors import UserError
from sa_jax.files import is_remote, move, read_text, remove, write_text
from sa_jax.formats.extras import read_json
from sa_jax.formats.orbax_folder import is_checkpoint
from sa_jax.train import config as configs
from sa_jax.train.config import TrainConfig


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
  """Creates and locks the folder; the lock ends with the process, even if that is killed.

  In a bucket nothing is locked: the latest run takes over, and the previous one stops when it notices.

  Yields:
    A function to call on all processes before saving; it raises UserError if another run has taken over.

  Raises:
    UserError: if the folder cannot be created, or another process trains in it.
  """
  if is_remote(folder):
    yield _owned(folder)
    return
  lock = filelock.FileLock(folder / ".lock", timeout=0)
  fault = ""
  if jax.process_index() == 0:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      lock.acquire()
    except filelock.Timeout:
      fault = f"another process trains in {folder}; wait for its end, or name a new folder (`out`)"
    except NotImplementedError:
      pass  # the file system does not support locks
    except OSError as error:
      fault = f"cannot write to {folder}: {error.strerror}"
  if broadcast_number(bool(fault)):
    raise UserError(fault or f"cannot train in {folder}: see the first process's error")
  try:
    yield lambda: None
  finally:
    lock.release()


def _owned(folder: Path) -> Callable[[], None]:
  """Records the owner of a folder in a bucket; see `locked`."""
  mark, me = folder / "owner.txt", f"{socket.gethostname()}, process {os.getpid()}, {secrets.token_hex(8)}\n"
  run_on_first(f"the folder {folder}", lambda: write_text(mark, me))

  def check() -> None:
    if (found := read_text(mark)) != me:
      raise UserError(f"another run has taken over {folder}: {found.rsplit(',', 1)[0]}; this one stops")

  return lambda: run_on_first(f"the owner of {folder}", check)


def can_resume(folder: Path) -> bool:
  """Whether a run's folder has something to resume from."""
  steps = (path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
  return any(path.is_dir() and any(path.iterdir()) for path in steps) or is_checkpoint(folder / "model")


def is_missing(model: Path) -> bool:
  """Whether the model has not been written yet; removes an empty folder of its name."""
  if model.is_dir() and not any(model.iterdir()) and jax.process_index() == 0:
    model.rmdir()
  return not is_checkpoint(model)


def checked(config: TrainConfig) -> TrainConfig:
  """Returns the run, with its start date and remat policy, if its folder is free or belongs to this run.

  A folder without saved progress counts as free, so that a failed start does not block another.

  Raises:
    UserError: if the folder belongs to another run, or to one without a ``config.json``.
  """
  path = config.out / "config.json"
  before: dict[str, object] = {}
  if can_resume(config.out):
    if not path.exists():
      raise UserError(
        f"{config.out} has checkpoints but no config.json for their run; use a new folder (`out`), or remove this one"
      )
    before = read_json(path)
    configs.check_same(config, before, config.out)
  if config.remat == "auto" and "remat" in before:
    config = dataclasses.replace(config, remat=cast(RematChoice, before["remat"]))
  if config.date is not None:
    return config
  if isinstance(then := before.get("date"), str):
    return dataclasses.replace(config, date=then)
  today = broadcast_number(datetime.datetime.now().date().toordinal())
  return dataclasses.replace(config, date=datetime.date.fromordinal(today).isoformat())


def claim(config: TrainConfig) -> None:
  """Records the run in the folder, and removes the exported models of a failed start.

  Raises:
    UserError: if it cannot be written.
  """
  wait_for_all("checked")
  if jax.process_index() == 0:
    if not can_resume(config.out):
      remove(config.out / "models")
    write_text(config.out / "config.json", json.dumps(configs.recorded(config), indent=2) + "\n")
  wait_for_all("claimed")


def make_room(out: Path, done: int) -> str | None:
  """Moves the finished model of a continued run to ``models/``, named by its step.

  Returns:
    A message, if there was a model.

  Raises:
    UserError: if something else is at the model's path.
  """
  path, kept = out / "model", out / "models" / str(done)
  if not path.exists():
    return None
  try:
    if is_checkpoint(path):
      move(path, kept)
      return f"the model of step {done} is now {kept}"
    path.rmdir()
  except OSError as error:
    raise UserError(f"{path} is in the way of the trained model: {error.strerror}") from None
  return None


def describe(values: Mapping[str, object]) -> str:
  """Names and values as text, one per line."""
  width = max(map(len, values))
  return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
