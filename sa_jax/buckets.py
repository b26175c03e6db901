"""Paths such as ``gs://bucket/name``: `etils.epath` paths whose errors are one line and come within a minute."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from etils import epath
from etils.epath import gpath

from sa_jax.errors import UserError

_PATIENCE = 45.0
"""Seconds within which a bucket must first answer; otherwise there is an error within a minute."""
_ORDINARY = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, UserError)
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_DRIVERS = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3")
_answering: set[str] = set()

P = ParamSpec("P")
T = TypeVar("T")


def remote(url: str) -> epath.Path:
  """The path of a URL.

  Raises:
    UserError: if its scheme is unknown.
  """
  try:
    made = epath.Path(url)
  except KeyError:
    scheme = url.split("://")[0]
    raise UserError(f"{url}: unknown storage {scheme}://; use gs://, s3:// or a local path") from None
  return Remote(url) if isinstance(made, gpath.PosixGPath) else made


def _one_line_errors(method: Callable[P, T]) -> Callable[P, T]:
  """A method with one-line errors: drivers raise dozens of types for an unusable bucket."""

  @functools.wraps(method)
  def call(*arguments: P.args, **options: P.kwargs) -> T:
    path = str(arguments[0])
    root = "/".join(path.split("/")[:3])
    work = lambda: method(*arguments, **options)
    try:
      found = work() if root in _answering else _within(_PATIENCE, work, root)
    except _ORDINARY as error:
      if not isinstance(error, UserError):
        _answering.add(root)
      raise
    except Exception as error:
      # A bucket that never answered is the cause, whatever was requested.
      raise UserError(f"{path if root in _answering else root} cannot be used: {reason(error, root)}") from error
    _answering.add(root)
    return found

  return call


def _listed(method: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
  return functools.wraps(method)(lambda *arguments, **options: iter([*method(*arguments, **options)]))


class Remote(gpath.PosixGPath):
  """An `etils.epath` path with one-line errors."""

  exists = _one_line_errors(gpath.PosixGPath.exists)
  is_dir = _one_line_errors(gpath.PosixGPath.is_dir)
  iterdir = _one_line_errors(_listed(gpath.PosixGPath.iterdir))
  glob = _one_line_errors(_listed(gpath.PosixGPath.glob))
  mkdir = _one_line_errors(gpath.PosixGPath.mkdir)
  rmdir = _one_line_errors(gpath.PosixGPath.rmdir)
  rmtree = _one_line_errors(gpath.PosixGPath.rmtree)
  unlink = _one_line_errors(gpath.PosixGPath.unlink)
  open = _one_line_errors(gpath.PosixGPath.open)
  stat = _one_line_errors(gpath.PosixGPath.stat)

  def resolve(self, strict: bool = False) -> Remote:
    """Itself: there are no links."""
    del strict
    return self

  def absolute(self) -> Remote:
    """Itself."""
    return self

  def is_symlink(self) -> bool:
    """False: there are no links."""
    return False


def reason(error: BaseException, root: str = "") -> str:
  """A driver's error in one line."""
  said = " ".join(str(error).split()) or type(error).__name__
  extra = _EXTRAS.get(root.split("://")[0])
  if isinstance(error, ImportError) and extra is not None:
    return f"{said}: pip install 'sa-jax[{extra}]'"
  return said if len(said) <= 300 else f"{said[:300]}…"


def is_of_driver(error: BaseException) -> bool:
  """Whether an error comes from a driver and has its own type, unlike bugs of ours."""
  return isinstance(error, NotImplementedError) or type(error).__module__.split(".")[0] in _DRIVERS


def _within(seconds: float, work: Callable[[], T], what: str) -> T:
  """The result of ``work``, with a timeout: drivers may retry an unresolvable name forever."""
  out: list[T] = []
  faults: list[BaseException] = []

  def run() -> None:
    try:
      out.append(work())
    except BaseException as error:
      faults.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  if faults:
    raise faults[0]
  if not out:
    raise UserError(f"{what} does not respond within {seconds:.0f} s; check its name, the network and the credentials")
  return out[0]
