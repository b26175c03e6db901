"""Files that a user names: errors say which file, and what is written appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sa_jax.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def check_local(path: str | Path) -> None:
  """Checks that a name is a path on this machine; as one, ``gs://bucket`` would be a folder named ``gs:``.

  Raises:
    UserError: if it names other storage.
  """
  if match := _SCHEME.match(str(path)):
    raise UserError(
      f"{path} is on {match[1]}:// storage, which is not supported; copy it to a disk, or mount the bucket"
    )


def check_regular(path: Path, most: int | None = None) -> None:
  """Checks that a path is a file of some size: reading a pipe may wait for ever, and a device may have no end.

  Args:
    path: what exists.
    most: the most bytes that such a file has.

  Raises:
    UserError: if it is something else, or larger.
  """
  if not path.is_file():
    raise UserError(f"{path} is a {'folder' if path.is_dir() else 'pipe or a device'}, not a file")
  if most is not None and (size := path.stat().st_size) > most:
    raise UserError(f"{path} has {size:,} bytes; such a file has at most {most:,}")


@contextlib.contextmanager
def named(path: Path, what: str = "read") -> Iterator[None]:
  """Inside, what the system refuses (no such file, no permission, a full disk) is a `UserError` that names the file.

  Args:
    path: the file or folder.
    what: what is done with it: ``read``, ``write``, ``make the folder``.
  """
  check_local(path)
  try:
    yield
  except OSError as error:
    # A temporary name beside the file is not one that the user knows.
    culprit = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    other = "" if culprit.parent in (path.parent, path.resolve().parent) else f" ({culprit})"
    raise UserError(f"cannot {what} {path}: {error.strerror or error}{other}") from error


def read_text(path: Path) -> str:
  """A text file's contents.

  Raises:
    UserError: if it cannot be read, or is not UTF-8 text.
  """
  try:
    with named(path):
      return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
  """A file to write under a temporary name; it replaces the one at ``path`` when the block ends well, or goes.

  A device or a pipe, such as ``/dev/stdout``, is written as it is.

  Raises:
    UserError: if it cannot be written.
  """
  with named(path, "write"):
    if path.exists() and not path.is_file() and not path.is_dir():
      yield path
      return
    path = path.resolve()  # the file behind a link is replaced, not the link
    if path.is_dir():
      raise UserError(f"cannot write {path}: it is a folder")
    unfinished = _unfinished(path)
    try:
      yield unfinished
      unfinished.replace(path)
    finally:
      unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  """Writes a text file, whole or not at all.

  Raises:
    UserError: if it cannot be written.
  """
  with new_file(path) as file:
    file.write_text(text, encoding="utf-8")


def check_writable(path: Path | None) -> None:
  """Checks, before the work that it is for, that a file can be written; nothing of it is left.

  Raises:
    UserError: if it cannot.
  """
  if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
    return
  with named(path, "write"):
    if path.is_dir():
      raise UserError(f"cannot write {path}: it is a folder")
    unfinished = _unfinished(path.resolve())
    unfinished.touch()
    unfinished.unlink()


def make_folder(path: Path) -> None:
  """Makes a folder, or uses the one that is there.

  Raises:
    UserError: if it cannot be made or written to.
  """
  with named(path, "make the folder"):
    path.mkdir(parents=True, exist_ok=True)
  check_writable(path / "any")


def check_absent(path: Path | None) -> None:
  """Checks, before the work that it is for, that a folder does not exist and can be made.

  Raises:
    UserError: if it exists, or cannot be made.
  """
  if path is None:
    return
  check_local(path)
  if path.exists() or path.is_symlink():
    raise UserError(f"{path} exists already; name a new folder, or remove it first")
  above = next(parent for parent in path.absolute().parents if parent.exists())
  if not above.is_dir():
    raise UserError(f"cannot write {path}: {above} is not a folder")
  if not os.access(above, os.W_OK | os.X_OK):
    raise UserError(f"cannot write {path}: {above} may not be written to")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill under a temporary name; it gets its own name when the block ends well, and goes when it fails.

  What a killed process left behind under such a name is removed.

  Raises:
    UserError: if the folder exists already, cannot be written, or another process is writing it.
  """
  check_absent(path)
  with named(path, "write"):
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    unfinished = _unfinished(path)
    unfinished.mkdir()
    with _held(unfinished):
      try:
        yield unfinished
        os.rename(unfinished, path)
      finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(path: Path) -> Path:
  """A name beside a file or folder that no other process takes, even where all have the same number.

  It ends as the file's own does, which tells some writers what to write.
  """
  return path.with_name(f".{path.name}.unfinished-{secrets.token_hex(4)}{path.suffix}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
  """Holds a lock on a folder, which ends with the process; yields whether nobody else had it."""
  try:
    import fcntl
  except ImportError:  # not on Windows: nothing is known of other processes there
    yield True
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      free = True
    except BlockingIOError:
      free = False
    except OSError:  # a file system without locks
      free = True
    yield free
  finally:
    os.close(handle)


def _remove_abandoned(path: Path) -> None:
  """Removes what killed processes left of a folder.

  Raises:
    UserError: if another process is writing it.
  """
  for folder in path.parent.glob(f".{_literal(path.name)}.unfinished-*"):
    with _held(folder) as free:
      if not free:
        raise UserError(f"another process is writing {path}; wait for it, or name another folder")
      shutil.rmtree(folder, ignore_errors=True)


def _literal(name: str) -> str:
  """A glob pattern that matches only the name."""
  return "".join(f"[{character}]" if character in "*?[" else character for character in name)
