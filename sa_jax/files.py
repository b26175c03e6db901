"""Files that a user names, on disks and in buckets: errors name the file, and writes are atomic.

`as_path` is the only way from a name to a path. Where buckets differ from disks, the functions here handle both.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import cast

from sa_jax.buckets import is_of_driver, reason, remote
from sa_jax.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_REFUSED = re.compile(
  "No space left on device|Disk quota exceeded|File too large|Read-only file system|Permission denied|"
  "Input/output error"
)
"""Error messages of native libraries, which raise their own exception types."""
_UNFINISHED = ".unfinished"
"""Marker file of a folder in a bucket that is being written."""


def as_path(name: str | os.PathLike[str]) -> Path:
  """A local path, or for a name such as ``gs://bucket/file`` an `etils.epath` path, which has the same methods.

  Raises:
    UserError: if the name has an unknown scheme.
  """
  text = os.fspath(name)
  if (match := _URL.match(text)) is None:
    return Path(text)
  # pathlib, which may have parsed the name before, reduces two slashes to one.
  return cast(Path, remote(f"{match[1]}://{match[2]}"))


def is_remote(path: PurePath) -> bool:
  """Whether a path that `as_path` made is in a bucket."""
  return not isinstance(path, Path)


def check_local(path: Path, what: str) -> None:
  """Checks that a path is on a disk of this machine.

  Raises:
    UserError: if it is in a bucket.
  """
  if is_remote(path := as_path(path)):
    raise UserError(f"{what} must be on a local disk; copy {path} to one")


def size_of(file: Path) -> int:
  """The size of a file in bytes."""
  found = file.stat()
  return int(found.length if is_remote(file) else found.st_size)  # type: ignore[attr-defined]


def check_regular(path: Path, most: int | None = None) -> None:
  """Checks that a path is a regular file of limited size: reading a pipe may block, and a device may be endless.

  Args:
    path: an existing path.
    most: maximum size in bytes; None for no limit.

  Raises:
    UserError: if it is not a regular file, or larger.
  """
  if not path.is_file():
    raise UserError(f"{path} is a {'folder' if path.is_dir() else 'pipe or a device'}, not a file")
  if most is not None and (size := size_of(path)) > most:
    raise UserError(f"{path} has {size:,} bytes; at most {most:,} are allowed")


@contextlib.contextmanager
def named(path: Path, what: str = "read") -> Iterator[None]:
  """Turns system errors inside (no such file, no permission, a full disk) into a `UserError` that names the file.

  Args:
    path: the file or folder.
    what: the operation: ``read``, ``write``, ``make the folder``.
  """
  path = as_path(path)
  # Report the final name instead of a temporary one.
  shown = re.sub(r"(^|/)\.([^/]+)\.unfinished-[^/]+(/.*)?$", r"\1\2", str(path))
  try:
    yield
  except OSError as error:
    # The user does not know temporary names next to the file.
    culprit = as_path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    other = "" if culprit.parent in (path.parent, path.resolve().parent) else f" ({culprit})"
    raise UserError(f"cannot {what} {shown}: {_reason(error)}{other}") from error
  except UserError:
    raise
  except Exception as error:
    if is_remote(path) and is_of_driver(error):
      raise UserError(f"cannot {what} {shown}: {reason(error)}") from error
    if (found := _REFUSED.search(str(error))) is None:
      raise
    raise UserError(f"cannot {what} {shown}: {found[0]}") from error


def _reason(error: OSError) -> str:
  return error.strerror or ("No such file or directory" if isinstance(error, FileNotFoundError) else str(error))


def read_text(path: Path) -> str:
  """A text file's contents.

  Raises:
    UserError: if it cannot be read, or is not UTF-8 text.
  """
  path = as_path(path)
  try:
    with named(path):
      return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
  """A local file to write; it replaces the one at ``path`` if the block succeeds, and is removed otherwise.

  A device or a pipe, such as ``/dev/stdout``, is written directly. Leftovers of killed processes are removed.

  Raises:
    UserError: if it cannot be written.
  """
  path = as_path(path)
  with named(path, "write"):
    if path.exists() and not path.is_file() and not path.is_dir():
      yield path
      return
    path = path.resolve()  # the file behind a link is replaced, not the link
    if path.is_dir():
      raise UserError(f"cannot write {path}: it is a folder")
    if is_remote(path):
      with tempfile.TemporaryDirectory(prefix="sa_jax-") as folder:
        yield Path(folder, path.name)
        copy(Path(folder, path.name), path)
      return
    _remove_abandoned(path)
    unfinished = _unfinished(path)
    unfinished.touch()
    with _held(unfinished):
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
  """Checks, before any work, that a file can be written; leaves nothing behind.

  Raises:
    UserError: if it cannot.
  """
  if path is None:
    return
  path = as_path(path)
  if path.exists() and not path.is_file() and not path.is_dir():
    return
  with named(path, "write"):
    if path.is_dir():
      raise UserError(f"cannot write {path}: it is a folder")
    unfinished = _unfinished(path.resolve())
    unfinished.write_bytes(b"")
    unfinished.unlink()


def make_folder(path: Path) -> None:
  """Creates a folder, or uses an existing one.

  Raises:
    UserError: if it cannot be made or written to.
  """
  path = as_path(path)
  with named(path, "make the folder"):
    path.mkdir(parents=True, exist_ok=True)
  check_writable(path / "any")


def check_folder(path: Path) -> None:
  """Checks, before any work, that a folder can be created, or that files can be written to it.

  Raises:
    UserError: if they cannot.
  """
  path = as_path(path)
  if is_remote(path) or path.is_dir():
    return check_writable(path / "any")
  if path.exists():
    raise UserError(f"cannot make the folder {path}: it is a file")
  _check_above(path)


def check_absent(path: Path | None) -> None:
  """Checks, before any work, that a folder does not exist and can be created.

  Raises:
    UserError: if it exists, or cannot be made.
  """
  if path is None:
    return
  path = as_path(path)
  if is_remote(path):
    if path.exists() and not (path / _UNFINISHED).exists():
      raise UserError(f"{path} exists already; name a new folder, or remove it first")
    return check_writable(path / "any")
  if path.exists() or path.is_symlink():
    raise UserError(f"{path} exists already; name a new folder, or remove it first")
  _check_above(path)


def _check_above(path: Path) -> None:
  """Checks that a path that does not exist can be created."""
  above = next(parent for parent in path.absolute().parents if parent.exists())
  if not above.is_dir():
    raise UserError(f"cannot write {path}: {above} is not a folder")
  if not os.access(above, os.W_OK | os.X_OK):
    raise UserError(f"cannot write {path}: {above} is not writable")


def check_whole(path: Path) -> None:
  """Checks that a folder in a bucket is not unfinished: being written, or abandoned.

  Raises:
    UserError: if it is.
  """
  if is_remote(path) and (path / _UNFINISHED).exists():
    raise UserError(f"{path} is unfinished: it is still being written, or its writer was killed; write it again")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill; it appears complete if the block succeeds, and is removed otherwise.

  Until then it has a temporary name on a disk, or a marker in a bucket that `check_whole` detects. Leftovers of killed
  processes are removed.

  Raises:
    UserError: if the folder already exists, cannot be written, or another process on this machine is writing it.
  """
  path = as_path(path)
  check_absent(path)
  with named(path, "write"):
    if is_remote(path):
      with _marked(path):
        yield path
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _remove_abandoned(path):
      raise UserError(f"another process is writing {path}; wait for it, or use another folder")
    unfinished = _unfinished(path)
    unfinished.mkdir()
    with _held(unfinished):
      try:
        yield unfinished
        os.rename(unfinished, path)
      finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _marked(path: Path) -> Iterator[None]:
  """Marks a folder in a bucket as unfinished until the block succeeds; removes the folder on failure."""
  remove(path)
  mark = path / _UNFINISHED
  mark.write_text(f"{socket.gethostname()}, process {os.getpid()}\n")
  try:
    yield
  except BaseException:
    remove(path)
    raise
  mark.unlink()


def remove(path: Path) -> None:
  """Removes a file, or a folder with its contents, if it exists and as far as possible."""
  path = as_path(path)
  if is_remote(path):
    with contextlib.suppress(OSError, UserError):
      path.rmtree(missing_ok=True)  # type: ignore[attr-defined]
  elif path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
  """Renames a folder within the same bucket or disk, replacing an existing target.

  Raises:
    OSError: if the system refuses it.
  """
  remove(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  if not is_remote(source):
    source.rename(target)
    return
  for file in files_in(source):
    copy(file, target / file.relative_to(source))
  remove(source)


def files_in(folder: Path) -> list[Path]:
  """All files in a folder, recursively."""
  found = []
  for each in folder.iterdir():
    found += files_in(each) if each.is_dir() else [each]
  return found


def copy(source: Path, target: Path) -> None:
  """Copies a file between any disks and buckets, without modes and times.

  Raises:
    OSError: if the system refuses it.
  """
  with source.open("rb") as reading, target.open("wb") as writing:
    shutil.copyfileobj(reading, writing, 2**22)


def _unfinished(path: Path) -> Path:
  """A temporary name next to a file or folder, unique across processes even if their ids are equal.

  It keeps the suffix, from which some writers infer the format.
  """
  return path.with_name(f".{path.name}.unfinished-{secrets.token_hex(4)}{path.suffix}")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
  """Holds a lock on a file or folder, released when the process ends; yields whether it was free."""
  try:
    import fcntl
  except ImportError:  # Windows: other processes cannot be detected
    yield True
    return
  handle = os.open(path, os.O_RDONLY)
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


def _remove_abandoned(path: Path) -> bool:
  """Removes leftovers of killed processes; returns whether no other process is writing the file or folder."""
  alone = True
  for left in path.parent.glob(f".{_literal(path.name)}.unfinished-*"):
    with contextlib.suppress(FileNotFoundError), _held(left) as free:  # another process may have just finished it
      if not free:
        alone = False
      elif left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
      else:
        left.unlink()
  return alone


def _literal(name: str) -> str:
  """A glob pattern that matches only this name."""
  return "".join(f"[{character}]" if character in "*?[" else character for character in name)
