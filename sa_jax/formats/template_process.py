"""Renders chat templates in a separate process with limited time and memory.

A chat template is untrusted code. Jinja's sandbox prevents access to files and Python internals, but not endless loops
or huge strings, and no check within one process can interrupt a running multiplication.
`sa_jax.formats.chat_template` starts this file; it imports nothing of ours.

Each input line is a JSON object: ``template``, ``calls`` (the variables of each rendering) and ``now``. Each output
line is the answer to one: ``done``, a list of ``text`` and ``spans``, or ``error``.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def _serve(seconds: int, memory: int, characters: int) -> None:
  """Answers requests until the input ends."""
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent handles them
    signal.signal(number, signal.SIG_IGN)
  _limit(memory)
  import jinja2.ext  # after the memory limit is set, but before CPU time is counted
  import jinja2.sandbox  # noqa: F401

  watch = functools.partial(_watch, seconds)
  for line in sys.stdin:
    try:
      answer: dict[str, object] = {"done": _rendered(json.loads(line), watch, characters)}
    except MemoryError:
      answer = {"error": f"it takes more than {memory >> 20} MiB of memory"}
    except Exception as error:  # any exception is the template's fault
      kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
      answer = {"error": kind + str(error)[:500]}
    print(json.dumps(answer), flush=True)


def _limit(memory: int) -> None:
  """Limits this process's memory, if the system supports that."""
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource

    for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
      hard = resource.getrlimit(kind)[1]
      resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _watch(seconds: float) -> None:
  """Limits this process's CPU time from now on; then SIGPROF ends it.

  Earlier CPU time and waiting for a processor do not count.
  """
  if hasattr(signal, "setitimer"):  # on Unix
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _rendered(request: dict[str, object], watch: Callable[[], None], characters: int) -> list[dict[str, object]]:
  from jinja2 import TemplateError

  template, calls, now = request["template"], request["calls"], request["now"]
  assert isinstance(template, str)
  assert isinstance(calls, list)
  watch()
  environment, compiled = _compiled(template)
  moment = datetime.datetime.fromisoformat(str(now))
  environment.globals["strftime_now"] = moment.strftime
  out: list[dict[str, object]] = []
  for variables in calls:
    watch()
    blocks: list[str] = []
    with environment.tracked(blocks) as spans:
      length = 0
      for block in compiled.generate(**variables):
        blocks.append(block)
        length += len(block)
        if length > characters:
          raise TemplateError(f"it writes more than {characters} characters")
    text = "".join(blocks)
    # Marked text inside a macro has no position in the output yet.
    true = all(text[start : start + len(said)] == said for start, said in spans)
    out.append({"text": text, "spans": [[start, start + len(said)] for start, said in spans] if true else []})
  return out


@functools.lru_cache(maxsize=16)
def _compiled(template: str):  # type: ignore[no-untyped-def]  # jinja2 is imported late
  """A compiled template and its own environment: Jinja as configured in transformers' `chat_template_utils`."""
  import jinja2
  from jinja2 import nodes
  from jinja2.ext import Extension, LoopControlExtension
  from jinja2.parser import Parser
  from jinja2.sandbox import ImmutableSandboxedEnvironment
  from jinja2.utils import Namespace

  class Generation(Extension):
    """``{% generation %}``, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
      """Wraps the statements between the tags in a call that records their output."""
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
      said, made = caller(), self.environment
      assert isinstance(made, Environment)
      made.spans.append((sum(map(len, made.blocks)), said))
      return said

  class Environment(ImmutableSandboxedEnvironment):
    """Tracks the output and the assistant's parts of it."""

    blocks: list[str] = []
    spans: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def tracked(self, blocks: list[str]) -> Iterator[list[tuple[int, str]]]:
      self.blocks, self.spans = blocks, []
      yield self.spans

  class Attributes(Namespace):
    """A namespace without names that are special in Python."""

    def __init__(self, *given: object, **named: object) -> None:
      super().__init__()
      for name, value in dict(*given, **named).items():
        self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
      if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
      super().__setitem__(name, value)

  def fail(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: object, **how: object) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | how)  # type: ignore[arg-type]

  made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
  made.filters["tojson"] = to_json  # Jinja's own filter escapes HTML
  made.globals |= {"raise_exception": fail, "namespace": Attributes}
  return made, made.from_string(template)


if __name__ == "__main__":
  sys.path += [folder for folder in sys.argv[4:] if Path(folder).is_dir() and folder not in sys.path]
  _serve(*map(int, sys.argv[1:4]))
