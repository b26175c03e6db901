"""The program that renders chat templates: a process of its own, whose time and memory are bounded.

A chat template is a program that somebody else wrote. Jinja's sandbox keeps it from files and from Python, not from
looping for ever and not from multiplying strings, and no check inside one process can stop a multiplication that has
begun. `sa_jax.formats.chat_template` starts this file; it imports nothing of ours.

Each line of the input is a JSON object: ``template``, ``calls`` (the variables of each rendering) and ``now``. Each
line of the output answers one: ``done``, a list of ``text`` and ``spans``, or ``error``.
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
  for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a scheduler sends to all: the parent answers
    signal.signal(number, signal.SIG_IGN)
  _limit(memory)
  import jinja2.ext  # with the limits in place, and before computing is counted
  import jinja2.sandbox  # noqa: F401

  watch = functools.partial(_watch, seconds)
  for line in sys.stdin:
    try:
      answer: dict[str, object] = {"done": _rendered(json.loads(line), watch, characters)}
    except MemoryError:
      answer = {"error": f"it takes more than {memory >> 20} MiB of memory"}
    except Exception as error:  # whatever a template does is the template's fault
      kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
      answer = {"error": kind + str(error)[:500]}
    print(json.dumps(answer), flush=True)


def _limit(memory: int) -> None:
  """Bounds this process's memory, where the system has such limits."""
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource

    for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
      hard = resource.getrlimit(kind)[1]
      resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _watch(seconds: float) -> None:
  """Gives this process so many seconds of computing from here on, after which SIGPROF ends it.

  What it has used before does not count, nor does waiting for a processor.
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
    # What is marked inside a macro has no place in the text yet when it is counted.
    true = all(text[start : start + len(said)] == said for start, said in spans)
    out.append({"text": text, "spans": [[start, start + len(said)] for start, said in spans] if true else []})
  return out


@functools.lru_cache(maxsize=16)
def _compiled(template: str):  # type: ignore[no-untyped-def]  # jinja2 is imported late
  """A template, and the environment that is its own: Jinja as transformers' `chat_template_utils` sets it up."""
  import jinja2
  from jinja2 import nodes
  from jinja2.ext import Extension, LoopControlExtension
  from jinja2.parser import Parser
  from jinja2.sandbox import ImmutableSandboxedEnvironment
  from jinja2.utils import Namespace

  class Generation(Extension):
    """``{% generation %}``, which marks what an assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
      """The statements between the tags, as a call that notes what they write."""
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
      said, made = caller(), self.environment
      assert isinstance(made, Environment)
      made.spans.append((sum(map(len, made.blocks)), said))
      return said

  class Environment(ImmutableSandboxedEnvironment):
    """Knows what was written, and which of it an assistant says."""

    blocks: list[str] = []
    spans: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def tracked(self, blocks: list[str]) -> Iterator[list[tuple[int, str]]]:
      self.blocks, self.spans = blocks, []
      yield self.spans

  class Attributes(Namespace):
    """A namespace without names that Python reads."""

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
  made.filters["tojson"] = to_json  # Jinja's own escapes for HTML
  made.globals |= {"raise_exception": fail, "namespace": Attributes}
  return made, made.from_string(template)


if __name__ == "__main__":
  sys.path += [folder for folder in sys.argv[4:] if Path(folder).is_dir() and folder not in sys.path]
  _serve(*map(int, sys.argv[1:4]))
