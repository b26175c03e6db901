"""What programs do on a disk, done in a bucket: reading files in parts, and writing to one that grows.

Objects in a bucket appear whole when they are closed, and never grow; nothing is mapped into memory.
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
  """The folder of copies, which goes with this process."""
  folder = tempfile.mkdtemp(prefix="sa_jax-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return Path(folder)


def local_copy(path: Path) -> Path:
  """A file as one on this machine, for readers that can have no other: itself, or a copy that goes with this process.

  Raises:
    UserError: if it cannot be read, or there is no room.
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
  """A file on this machine that is as long as another and begins like it, for what is checked by these two."""
  if not is_remote(path):
    yield path
    return
  with tempfile.NamedTemporaryFile(prefix="sa_jax-") as file:
    file.write(head)
    file.truncate(size_of(path))  # a hole takes no room
    file.flush()
    yield Path(file.name)


def range_of(path: Path, start: int, size: int, wanted: slice) -> np.ndarray:
  """Bytes of a file in a bucket.

  Args:
    path: the file.
    start: where in the file the bytes begin.
    size: how many there are.
    wanted: which of them are read; the others are not set, and take no memory.

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
  """A folder that is written to as work goes on: itself on a disk, or a local one whose files are copied to a bucket.

  Attributes:
    local: where to write.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._temporary = tempfile.TemporaryDirectory(prefix="sa_jax-") if is_remote(folder) else None
    self.local = Path(self._temporary.name) if self._temporary else folder
    self._copied: dict[Path, tuple[int, int]] = {}
    self._resting = 0.0

  def push(self, at_once: bool = False) -> None:
    """Copies what has changed; unless that has to be at once, a tenth of the time at most is spent on it.

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
    """Copies the rest.

    Raises:
      UserError: if the bucket cannot be written.
    """
    if self._temporary is None:
      return
    self.push(at_once=True)
    self._temporary.cleanup()
