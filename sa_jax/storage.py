"""Partial reads and incremental writes for files in a bucket.

Objects in a bucket appear when they are closed, cannot be appended to, and cannot be memory-mapped.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sa_jax.errors import UserError
from sa_jax.files import copy, files_in, is_remote, named, size_of

_LOG = logging.getLogger("sa_jax")
_COPYING = threading.Lock()


@functools.cache
def _copies() -> Path:
  """A folder of copies that is removed when this process exits."""
  folder = tempfile.mkdtemp(prefix="sa_jax-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return Path(folder)


def local_copy(path: Path) -> Path:
  """A local path for a file, for readers that need one: the file itself, or a copy that is removed on exit.

  Raises:
    UserError: if the file cannot be read, or the disk is full.
  """
  if not is_remote(path):
    return path
  with _COPYING:
    made = _copies() / hashlib.sha256(str(path).encode()).hexdigest()[:16] / path.name
    if not made.exists():
      _LOG.info("%s is copied to this machine's disk", path)
      made.parent.mkdir(exist_ok=True)
      with named(path), named(made, "write"):
        part = made.with_name("part")
        copy(path, part)
        part.replace(made)
  return made


@contextlib.contextmanager
def outline(path: Path, head: bytes) -> Iterator[Path]:
  """A local sparse file with the size of ``path`` that begins with ``head``, for parsers of headers."""
  if not is_remote(path):
    yield path
    return
  with tempfile.NamedTemporaryFile(prefix="sa_jax-") as file:
    file.write(head)
    file.truncate(size_of(path))  # sparse: takes no disk space
    file.flush()
    yield Path(file.name)


def range_of(path: Path, start: int, size: int, wanted: slice) -> np.ndarray:
  """Reads a range of bytes of a file in a bucket.

  Args:
    path: the file.
    start: offset of the range in the file, in bytes.
    size: size of the range, in bytes.
    wanted: the part of the range to read; the rest of the result is uninitialised, and takes no memory.

  Returns:
    uint8 ``[size]``.
  """
  out = np.empty(size, np.uint8)
  with named(path), path.open("rb") as file:
    file.seek(start + wanted.start)
    found = file.read(wanted.stop - wanted.start)
  if len(found) != wanted.stop - wanted.start:
    raise UserError(f"{path} ends too early: it has no byte {start + wanted.start + len(found)}")
  out[wanted] = np.frombuffer(found, np.uint8)
  return out


class Mirrored:
  """A folder for incremental writes: the folder itself, or for a bucket a local folder that is copied there.

  Attributes:
    local: the local folder to write to.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._temporary = tempfile.TemporaryDirectory(prefix="sa_jax-") if is_remote(folder) else None
    self.local = Path(self._temporary.name) if self._temporary else folder
    self._copied: dict[Path, tuple[int, int]] = {}
    self._resting = 0.0

  def push(self, at_once: bool = False) -> None:
    """Copies changed files to the bucket. Unless ``at_once``, it is rate-limited to a tenth of the elapsed time.

    Raises:
      UserError: if the bucket cannot be written.
    """
    began = time.monotonic()
    if self._temporary is None or (not at_once and began < self._resting):
      return
    for file in files_in(self.local):
      state = file.stat().st_size, file.stat().st_mtime_ns
      if self._copied.get(file) != state:
        target = self._folder / file.relative_to(self.local)
        with named(target, "write"):
          copy(file, target)
        self._copied[file] = state
    now = time.monotonic()
    self._resting = now + 9 * (now - began)

  def close(self) -> None:
    """Copies the remaining changes.

    Raises:
      UserError: if the bucket cannot be written.
    """
    if self._temporary is None:
      return
    self.push(at_once=True)
    self._temporary.cleanup()
