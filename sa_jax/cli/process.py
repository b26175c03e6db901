"""Process-wide settings of a command, made once before JAX starts."""

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
"""The environment variable with the folder for compiled programs, or ``off``."""


class Terminated(SystemExit):
  """Raised on SIGTERM."""


def own(*, exact: bool, cache: bool = True) -> None:
  """Settings for a process that runs only this command. The user's own settings take precedence.

  Args:
    exact: whether products use exact float32.
    cache: whether to cache compiled programs for later commands.
  """
  # Modules and traced programs are many long-lived objects. Garbage-collecting them repeatedly delays the first token
  # by half a second.
  gc.freeze()
  gc.set_threshold(20_000)
  # Raise instead of dying on the spot, so that partial files are removed and finished ones kept.
  signal.signal(signal.SIGTERM, _terminated)
  # With XLA's Triton products, exact ones are autotuned for minutes: on a GPU, `share` was unfinished after 170 s;
  # without them, it takes 46 s. Only effective before JAX starts.
  flags = os.environ.get("XLA_FLAGS", "")
  if exact and _TRITON not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_TRITON}=false".strip()
  if cache:
    keep_compiled()


def keep_compiled() -> Path | None:
  """Lets JAX cache compiled programs in the user's cache folder, evicting the oldest if they take too much space.

  The variable `CACHE_VARIABLE` sets another folder, or ``off``. A folder already configured in JAX is not changed.

  Returns:
    The folder, or None if nothing was changed.
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
  except OSError:  # no home or no space: do not cache
    return None
  if not is_remote(folder) and not os.access(folder, os.W_OK | os.X_OK):
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return folder


def _terminated(number: int, frame: FrameType | None) -> None:
  if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
    # Exceptions during garbage collection are printed and lost: raise again afterwards.
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    return
  raise Terminated(128 + number)


def signal_behind(error: BaseException) -> int | None:
  """The exit code of the signal that ended the work, or None.

  An exception from a signal handler may surface from native code as a different exception, with the handler's as its
  cause.
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
  """Exits immediately: shutting Python down while XLA compiles in other threads may crash."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # the reader may be gone
      stream.flush()
  os._exit(code)
