"""The command line: one thin module per subcommand.

A subcommand is a dataclass whose fields are its flags and whose ``run`` does the work. Exit codes: 0 done; 1 a bug in
sa_jax, with its traceback; 2 errors that the user can fix, one per line; 130 and 143 interrupted by Ctrl-C and SIGTERM;
141 the reader closed the pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from sa_jax.errors import UserError, near

_NO_CACHE = "--no-compilation-cache"
_CLOSED_PIPE = 128 + 13
"""The exit code that shells report for SIGPIPE; also used on systems without it."""
_DESCRIPTION = f"""Shared Attention for JAX.

Before the command: --version prints versions; {_NO_CACHE} disables the compilation cache, as does
SA_JAX_COMPILATION_CACHE=off."""

_LESS_MEMORY = "use shorter rows, a smaller batch, a smaller dtype or more devices"


class Command(Protocol):
  """A parsed subcommand; one that computes in exact float32 has a true ``exact``."""

  def run(self) -> None:
    """Does the work; raises `UserError` for errors that the user can fix."""
    ...


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs ``sa-jax``; returns its exit code.

  Args:
    arguments: the subcommand and its flags; the process's own when None, which also changes process-wide settings (see
      `sa_jax.cli.process`).
  """
  from sa_jax.cli.process import leave, signal_behind

  try:
    return _run(arguments)
  except BaseException as error:
    if (code := signal_behind(error)) is None:
      raise
  return code if arguments is not None else leave(code)


def _run(arguments: Sequence[str] | None) -> int:
  from sa_jax.cli.flags import check_flags, explain, fields_of
  from sa_jax.cli.process import own

  given = list(sys.argv[1:] if arguments is None else arguments)
  fields: dict[str, object] = {}
  if given[:1] == ["--version"]:
    print(_versions())
    return 0
  cache = given[:1] != [_NO_CACHE]
  given = given if cache else given[1:]
  try:
    logging.basicConfig(format="%(name)s: %(message)s", level=_log_level())
    commands = _commands(given[0] if given else None)
    if given and given[0] in commands:
      fields = fields_of(commands[given[0]])
      check_flags(given[0], given[1:], fields)
    command = _parse(commands, given)
    if arguments is None:
      own(exact=getattr(command, "exact", False), cache=cache)
    command.run()
  except UserError as error:
    if os.environ.get("SA_JAX_DEBUG"):
      raise
    print(_fitted(f"sa-jax: error: {explain(str(error), fields)}"), file=sys.stderr)
    return 2
  except BrokenPipeError:  # the reader closed the pipe; Python would report it again at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _CLOSED_PIPE
  except Exception as error:
    if os.environ.get("SA_JAX_DEBUG") or not _is_out_of_memory(error):
      raise
    reason = str(error).removeprefix("RESOURCE_EXHAUSTED: ").split("\n")[0]
    print(_fitted(f"sa-jax: error: not enough memory ({reason}); {_LESS_MEMORY}"), file=sys.stderr)
    return 2
  return 0


def _log_level() -> str:
  """The log level from the environment.

  Raises:
    UserError: if the level is unknown.
  """
  given = os.environ.get("SA_JAX_LOG") or "WARNING"
  if given.upper() not in logging.getLevelNamesMapping():
    raise UserError(f"SA_JAX_LOG={given} is not a log level; use DEBUG, INFO, WARNING or ERROR")
  return given.upper()


def _is_out_of_memory(error: Exception) -> bool:
  """Whether a device or the host is out of memory. Does not import JAX for its exception type."""
  from_jax = type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")
  return from_jax or isinstance(error, MemoryError)


def _fitted(text: str) -> str:
  """The text wrapped at words to the terminal's width; unchanged without a terminal."""
  if not sys.stderr.isatty():
    return text
  width = shutil.get_terminal_size().columns
  indent = lambda line: " " * (len(line) - len(line.lstrip()) + 2)
  fill = lambda line: textwrap.fill(
    line, width, subsequent_indent=indent(line), break_long_words=False, break_on_hyphens=False
  )
  return "\n".join(map(fill, text.split("\n")))


def _versions() -> str:
  """The versions that a bug report should include."""
  from importlib.metadata import version

  import sa_jax

  others = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
  return f"sa-jax {sa_jax.__version__} ({others}, Python {sys.version.split()[0]})"


_COMMANDS = {
  "demo": "Demo",
  "convert": "Convert",
  "export": "Export",
  "push": "Push",
  "generate": "Generate",
  "chat": "Chat",
  "perplexity": "PerplexityOf",
  "eval": "Eval",
  "cost": "CostOf",
  "analyze": "Analyze",
  "search": "SearchPlan",
  "align": "Align",
  "refit": "RefitModel",
  "share": "Share",
  "train": "command",
  "fit": "FitOf",
  "doctor": "Doctor",
  "bench": "Bench",
}
"""Subcommands: the module of that name in this package, and its class or function."""


def _commands(asked: str | None = None) -> dict[str, Callable[..., Command]]:
  """The subcommands by name; only the requested one, if there is one, because importing the others takes time."""
  names = [asked] if asked in _COMMANDS else list(_COMMANDS)
  return {name: getattr(importlib.import_module(f"sa_jax.cli.{name}"), _COMMANDS[name]) for name in names}


def _parse(commands: dict[str, Callable[..., Command]], given: Sequence[str]) -> Command:
  """Parses the arguments into a subcommand.

  Raises:
    UserError: if values contradict each other.
    SystemExit: for ``--help``, and if arguments cannot be parsed, after printing why.
  """
  from sa_jax.cli.flags import fitted_help

  shown, captured = _Captured(sys.stdout), _Captured(sys.__stderr__)
  try:
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(captured):
      parsed = _parsed(commands, given)
  except SystemExit as stop:
    # If one of our dataclasses raises, tyro prints it as a parsing error; report it like other errors instead.
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, UserError):
      cause = cause.__context__
    if cause is not None:
      raise cause from None
    print(fitted_help(shown.getvalue(), shutil.get_terminal_size().columns), end="", flush=True)
    sys.stderr.write(captured.getvalue())
    raise
  sys.stderr.write(captured.getvalue())
  return parsed


def _parsed(commands: dict[str, Callable[..., Command]], given: Sequence[str]) -> Command:
  import tyro

  from sa_jax.cli.flags import registry

  config = (tyro.conf.OmitArgPrefixes,)
  name = given[0] if given else "--help"
  if name not in commands:
    if not name.startswith("-"):
      raise UserError(f"there is no command {name!r}; choose from {', '.join(_COMMANDS)}{near(name, _COMMANDS)}")
    found: Command = tyro.extras.subcommand_cli_from_dict(
      commands, prog="sa-jax", description=_DESCRIPTION, args=given, config=config, registry=registry
    )
    return found
  command = commands[name]
  if name == "train":
    from sa_jax.cli import train

    command, given = train.with_file(given)
  elif name in ("search", "share"):
    from sa_jax.cli.searching import Searching, with_effort

    assert isinstance(command, type)
    assert issubclass(command, Searching)
    command = with_effort(command, given)
  return tyro.cli(command, prog=f"sa-jax {name}", args=given[1:], config=config, registry=registry)


class _Captured(io.StringIO):
  """Captures stdout or stderr, with the same width, colours and encoding."""

  def __init__(self, stream: TextIO | None) -> None:
    super().__init__()
    self._stream = stream

  @property
  def encoding(self) -> str:  # type: ignore[override]
    return (getattr(self._stream, "encoding", None) or "utf-8").lower()

  def isatty(self) -> bool:
    return self._stream is not None and self._stream.isatty()
