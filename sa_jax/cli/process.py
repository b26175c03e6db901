"""What holds for the whole process of a command, set once, before JAX starts."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

_TRITON = "--xla_gpu_enable_triton_gemm"
_CACHE_BYTES = 2_000_000_000
CACHE_VARIABLE = "SA_JAX_COMPILATION_CACHE"
"""The environment variable that names the folder for compiled programs, or is ``off``."""


class Terminated(SystemExit):
  """SIGTERM has come."""


def own(*, exact: bool, cache: bool = True) -> None:
  """Settings of a process that is the command's alone; what the user has set stands.

  Args:
    exact: whether products are in exact float32.
    cache: whether compiled programs are kept for the next command.
  """
  # Modules stay, and tracing a program makes many small things that live: to look for cycles in all of it each time
  # takes half a second until a first token.
  gc.freeze()
  gc.set_threshold(20_000)
  # So that what is being written is removed, and finished parts stay: the default would end the process where it is.
  signal.signal(signal.SIGTERM, _terminated)
  # With XLA's Triton products, exact ones are tuned for minutes: `share` was unfinished on a GPU after 170 s; without,
  # it takes 46. Heeded only while JAX has not begun.
  flags = os.environ.get("XLA_FLAGS", "")
  if exact and _TRITON not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_TRITON}=false".strip()
  if cache:
    keep_compiled()


def keep_compiled() -> Path | None:
  """Lets JAX keep compiled programs in the user's cache folder, the oldest going first where they take too much.

  The variable `CACHE_VARIABLE` names another folder, or is ``off``; a folder that JAX has been told stays.

  Returns:
    The folder, or None where nothing was changed.
  """
  import jax

  from sa_jax.files import as_path, is_remote

  chosen = os.environ.get(CACHE_VARIABLE, "")
  if chosen.lower() in ("off", "0", "no", "none", "false") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return None
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  folder = as_path(chosen) if chosen else base / "sa_jax" / "compiled"
  try:
    if not is_remote(folder):
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError:  # without a home, or without room: programs are compiled each time
    return None
  if not is_remote(folder) and not os.access(folder, os.W_OK | os.X_OK):
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return folder


def _terminated(number: int, frame: FrameType | None) -> None:
  if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
    # What is raised inside garbage collection is printed and lost: once more, when it is over.
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    return
  raise Terminated(128 + number)


def signal_behind(error: BaseException) -> int | None:
  """The exit code of the signal that ended the work; None where none did.

  What a handler raises comes out of code that is not written in Python as an error of its own, with the handler's
  behind it.
  """
  at: BaseException | None = error
  while at is not None:
    if isinstance(at, KeyboardInterrupt):
      return 128 + signal.SIGINT
    if isinstance(at, Terminated):
      return 128 + signal.SIGTERM
    at = at.__cause__ or at.__context__
  return None


def leave(code: int) -> NoReturn:
  """Ends the process here: taking Python down while XLA compiles in other threads may end in a crash."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody may read it any more
      stream.flush()
  os._exit(code)
