"""A run's folder: whose it is, what it holds, and that only one process at a time trains in it."""

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
from sa_jax.distributed import by_first, of_first_process, wait_for_all
from sa_jax.errors import UserError
from sa_jax.files import is_remote, move, read_text, remove, write_text
from sa_jax.formats.extras import read_json
from sa_jax.formats.orbax_folder import is_checkpoint
from sa_jax.train import config as configs
from sa_jax.train.config import TrainConfig


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
  """Makes the folder, and keeps others out of it; the lock goes with the process, however that ends.

  In a bucket nothing is kept out: who comes last has the folder, and the run before stops when it finds that out.

  Yields:
    What to call before something is saved, on all processes; it raises UserError if another run has the folder.

  Raises:
    UserError: if the folder cannot be made, or another process trains in it.
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
      pass  # the file system has no locks
    except OSError as error:
      fault = f"cannot write to {folder}: {error.strerror}"
  if of_first_process(bool(fault)):
    raise UserError(fault or f"cannot train in {folder}: see the first process's error")
  try:
    yield lambda: None
  finally:
    lock.release()


def _owned(folder: Path) -> Callable[[], None]:
  """Writes into a folder in a bucket who has it; see `locked`."""
  mark, me = folder / "owner.txt", f"{socket.gethostname()}, process {os.getpid()}, {secrets.token_hex(8)}\n"
  by_first(f"the folder {folder}", lambda: write_text(mark, me))

  def check() -> None:
    if (found := read_text(mark)) != me:
      raise UserError(f"another run has taken over {folder}: {found.rsplit(',', 1)[0]}; this one stops")

  return lambda: by_first(f"the owner of {folder}", check)


def begun(folder: Path) -> bool:
  """Whether there is something in a run's folder to go on from."""
  steps = (path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
  return any(path.is_dir() and any(path.iterdir()) for path in steps) or is_checkpoint(folder / "model")


def is_missing(model: Path) -> bool:
  """Whether a model has not been written yet; an empty folder of its name is none, and is removed."""
  if model.is_dir() and not any(model.iterdir()) and jax.process_index() == 0:
    model.rmdir()
  return not is_checkpoint(model)


def checked(config: TrainConfig) -> TrainConfig:
  """The run, if its folder is free or holds this run, with the date on which it began and with what it recomputes.

  A folder in which nothing was saved yet holds no run: a start that failed stands in nobody's way.

  Raises:
    UserError: if the folder holds another run, or one that nothing tells of.
  """
  path = config.out / "config.json"
  before: dict[str, object] = {}
  if begun(config.out):
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
  today = of_first_process(datetime.datetime.now().date().toordinal())
  return dataclasses.replace(config, date=datetime.date.fromordinal(today).isoformat())


def claim(config: TrainConfig) -> None:
  """Writes into the folder which run it is; what a start that failed left of another run goes.

  Raises:
    UserError: if it cannot be written.
  """
  wait_for_all("checked")
  if jax.process_index() == 0:
    if not begun(config.out):
      remove(config.out / "models")
    write_text(config.out / "config.json", json.dumps(configs.recorded(config), indent=2) + "\n")
  wait_for_all("claimed")


def make_room(out: Path, done: int) -> str | None:
  """Moves the finished model of a run that goes on to ``models/``, by its step.

  Returns:
    What is to be said of it, if there was one.

  Raises:
    UserError: if something else is where the model belongs.
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
    raise UserError(f"{path} is in the way of the model that training makes: {error.strerror}") from None
  return None


def describe(values: Mapping[str, object]) -> str:
  """Names and values as lines of text, one below the other."""
  width = max(map(len, values))
  return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
