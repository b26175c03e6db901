"""Files that a user names, on disks and in buckets: errors say which file, and what is written appears whole or not.

`as_path` is the one way from a name to a path. Where buckets differ from disks, the functions here have both forms.
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
"""What libraries that are not written in Python say in errors of their own kinds."""
_UNFINISHED = ".unfinished"
"""In a bucket, lies in a folder as long as it is being written."""


def as_path(name: str | os.PathLike[str]) -> Path:
  """A path on this machine, or of a name such as ``gs://bucket/file`` an `etils.epath` path, which has its methods.

  Raises:
    UserError: if the name has a scheme that nobody knows.
  """
  text = os.fspath(name)
  if (match := _URL.match(text)) is None:
    return Path(text)
  # pathlib, which may have had the name before us, leaves one slash of two.
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
    raise UserError(f"{what} has to be on a disk of this machine; copy {path} to one")


def size_of(file: Path) -> int:
  """The bytes of a file."""
  found = file.stat()
  return int(found.length if is_remote(file) else found.st_size)  # type: ignore[attr-defined]


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
  if most is not None and (size := size_of(path)) > most:
    raise UserError(f"{path} has {size:,} bytes; such a file has at most {most:,}")


@contextlib.contextmanager
def named(path: Path, what: str = "read") -> Iterator[None]:
  """Inside, what the system refuses (no such file, no permission, a full disk) is a `UserError` that names the file.

  Args:
    path: the file or folder.
    what: what is done with it: ``read``, ``write``, ``make the folder``.
  """
  path = as_path(path)
  # The user knows a temporary name by the one that it is for.
  shown = re.sub(r"(^|/)\.([^/]+)\.unfinished-[^/]+(/.*)?$", r"\1\2", str(path))
  try:
    yield
  except OSError as error:
    # A temporary name beside the file is not one that the user knows.
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
  """A file on this machine to write; it replaces the one at ``path`` when the block ends well, or goes.

  A device or a pipe, such as ``/dev/stdout``, is written as it is. What a killed process left behind is removed.

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
  """Checks, before the work that it is for, that a file can be written; nothing of it is left.

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
  """Makes a folder, or uses the one that is there.

  Raises:
    UserError: if it cannot be made or written to.
  """
  path = as_path(path)
  with named(path, "make the folder"):
    path.mkdir(parents=True, exist_ok=True)
  check_writable(path / "any")


def check_folder(path: Path) -> None:
  """Checks, before the work that it is for, that a folder can be made, or that files can be written to it.

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
  """Checks, before the work that it is for, that a folder does not exist and can be made.

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
  """Checks that what does not exist can be made where it shall be."""
  above = next(parent for parent in path.absolute().parents if parent.exists())
  if not above.is_dir():
    raise UserError(f"cannot write {path}: {above} is not a folder")
  if not os.access(above, os.W_OK | os.X_OK):
    raise UserError(f"cannot write {path}: {above} may not be written to")


def check_whole(path: Path) -> None:
  """Checks that a folder in a bucket is not one that is being written, or was left so.

  Raises:
    UserError: if it is.
  """
  if is_remote(path) and (path / _UNFINISHED).exists():
    raise UserError(f"{path} is unfinished: it is still being written, or its writer was killed; write it again")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill; it appears whole, when the block ends well, and goes when that fails.

  On a disk it has a temporary name until then, in a bucket a mark that `check_whole` sees. What a killed process left
  behind is removed.

  Raises:
    UserError: if the folder exists already, cannot be written, or on this machine another process is writing it.
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
  """Marks a folder in a bucket as unfinished until the block ends well; when it fails the folder goes."""
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
  """Removes a file or a folder with all that is in it, if there is one and as far as that can be done."""
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
  """Gives a folder another name, in the same bucket or on the same disk; what has that name goes.

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
  """All files in a folder and the folders inside it."""
  found = []
  for each in folder.iterdir():
    found += files_in(each) if each.is_dir() else [each]
  return found


def copy(source: Path, target: Path) -> None:
  """Copies a file, from and to anywhere; modes and times are not copied.

  Raises:
    OSError: if the system refuses it.
  """
  with source.open("rb") as reading, target.open("wb") as writing:
    shutil.copyfileobj(reading, writing, 2**22)


def _unfinished(path: Path) -> Path:
  """A name beside a file or folder that no other process takes, even where all have the same number.

  It ends as the file's own does, which tells some writers what to write.
  """
  return path.with_name(f".{path.name}.unfinished-{secrets.token_hex(4)}{path.suffix}")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
  """Holds a lock on a file or folder, which ends with the process; yields whether nobody else had it."""
  try:
    import fcntl
  except ImportError:  # not on Windows: nothing is known of other processes there
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
  """Removes what killed processes left of a file or folder; returns whether no other process is writing it."""
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
  """A glob pattern that matches only the name."""
  return "".join(f"[{character}]" if character in "*?[" else character for character in name)
