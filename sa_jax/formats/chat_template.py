"""Chat templates: messages to the text that a model was trained on, as transformers formats them.

Templates are rendered in a separate process (`template_process`), started with the first chat and reused for later
ones.
"""

from __future__ import annotations

import atexit
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sa_jax.errors import UserError, shown

SECONDS = 3
"""CPU time limit of one rendering; ordinary chats take milliseconds."""
MEMORY = 1 << 29
"""Memory limit of the process, in bytes."""
CHARACTERS = 20_000_000
"""Maximum number of characters that one rendering may output."""

Message = Mapping[str, object]
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which datasets store an assistant's reasoning."""
_HERE = "HERE_THE_ASSISTANT_GOES_ON "
"""Marks the end of a message to continue; templates that strip whitespace remove its space."""


class Call(NamedTuple):
  """One rendering.

  Attributes:
    messages: the chat.
    prompt: whether to end with the generation prompt.
    variables: other template variables, such as ``tools``.
  """

  messages: Sequence[Message]
  prompt: bool
  variables: Mapping[str, object] = {}


class Rendered(NamedTuple):
  """A chat as text.

  Attributes:
    text: the chat's text.
    spans: first and past-last characters of the parts marked with ``{% generation %}``; empty if there are none.
  """

  text: str
  spans: tuple[tuple[int, int], ...] = ()


class Template(NamedTuple):
  """A chat template.

  Attributes:
    source: the Jinja source.
    special: the special tokens that it may refer to.
    now: the time for ``strftime_now``; None for the time of rendering.
  """

  source: str
  special: Mapping[str, str]
  now: datetime.datetime | None = None

  @property
  def uses_date(self) -> bool:
    """Whether the text may depend on the date."""
    return "strftime_now" in self.source

  def variables(self, options: Mapping[str, object]) -> dict[str, object]:
    """The template variables for a caller's options, including ``tools`` and ``documents``.

    Raises:
      UserError: if ``tools`` or ``documents`` are not objects, or an option is not a valid variable.
    """
    if "add_generation_prompt" in options:
      raise UserError("use `prompt` instead of the option add_generation_prompt")
    if "messages" in options:
      raise UserError("pass messages as an argument, not as an option")
    for name in ("tools", "documents"):
      given = options.get(name)
      if given is not None and not (isinstance(given, list | tuple) and all(isinstance(one, Mapping) for one in given)):
        raise UserError(f"{name} must be a list of objects (JSON schemas for tools), not {shown(given)}")
    return dict(options)

  def unread(self, options: Iterable[str]) -> list[str]:
    """The options that the template does not use."""
    return [name for name in options if not re.search(rf"\b{re.escape(name)}\b", self.source)]

  def render(self, calls: Sequence[Call]) -> list[Rendered]:
    """Renders chats. Keys with null values are removed from messages, as in transformers.

    Raises:
      UserError: if messages are not objects, or the template rejects them, fails, or exceeds its time or memory.
    """
    now = self.now or datetime.datetime.now()
    given = [
      {"messages": _messages(call.messages), "tools": None, "documents": None, **self.special, **call.variables}
      | {"add_generation_prompt": call.prompt}
      for call in calls
    ]
    try:
      request = json.dumps({"template": self.source, "calls": given, "now": now.isoformat()}, default=_plain)
    except (ValueError, RecursionError, TypeError) as error:
      raise UserError(f"the messages are not JSON values: {error}") from None
    answer = _process().ask(request)
    if "error" in answer:
      raise UserError(f"the chat template rejects these messages: {answer['error']}")
    done = answer["done"]
    assert isinstance(done, list)
    return [Rendered(each["text"], tuple((start, stop) for start, stop in each["spans"])) for each in done]

  def continued(self, messages: Sequence[Message], field: str = "content", variables: Mapping[str, object] = {}) -> str:
    """The chat up to the end of its last message, for the model to continue; keeps trailing spaces if possible.

    Args:
      messages: the chat.
      field: the field of the last message to continue: its content, or its ``reasoning_content``.
      variables: other template variables.

    Raises:
      UserError: see `render`; or if the last message has no text, or the template changes it.
    """
    if not messages:
      raise UserError("there is no last message to continue")
    *before, last = _messages(messages)
    content, given = _marked(last.get(field))
    fields = [name for name in _REASONING if last.get(name) == last.get(field)] if field in _REASONING else [field]
    (rendered,) = self.render([Call([*before, {**last, **dict.fromkeys(fields, given)}], False, variables)])
    text, mark = rendered.text, _HERE.strip()
    if mark not in text or content.strip() not in text:
      raise UserError("the chat template changes the last message, so it cannot be continued")
    at = text.rindex(mark)
    return text[:at] if text[at : at + len(_HERE)] == _HERE else text[:at].rstrip()


def _marked(content: object) -> tuple[str, object]:
  """The text to continue, and the message's field with a mark at the end of its last text; the field may be parts.

  Raises:
    UserError: if there is no text.
  """
  if isinstance(content, str):
    return content, content + _HERE
  parts = content if isinstance(content, list) else []
  for at, part in reversed(list(enumerate(parts))):
    if isinstance(part, dict) and isinstance(text := part.get("text"), str):
      return text, [*parts[:at], part | {"text": text + _HERE}, *parts[at + 1 :]]
  raise UserError("the last message has no text to continue")


def _messages(messages: Sequence[Message]) -> list[dict[str, object]]:
  """Messages without null values, with reasoning under the keys that templates use."""
  out = []
  for message in messages:
    if not isinstance(message, Mapping):
      raise UserError(f"a message must be an object with 'role' and 'content', not {type(message).__name__}")
    kept = {key: value for key, value in message.items() if value is not None}
    if (thought := next((kept[name] for name in _REASONING if name in kept), None)) is not None:
      kept = {"thinking": thought, **kept, "reasoning_content": thought}
    out.append(kept)
  return out


def _plain(value: object) -> object:
  """Converts values that JSON lacks: array scalars to numbers, tuples and sets to lists, others to their type name."""
  if isinstance(value, np.generic):
    return value.item()
  return list(value) if isinstance(value, tuple | set) else f"<{type(value).__name__}>"


class _Process:
  """The rendering process. It ends with this one, or when a template exceeds a limit; then a new one is started."""

  def __init__(self) -> None:
    self.owner = os.getpid()
    self._turn = threading.Lock()
    self._running: subprocess.Popen[str] | None = None

  def ask(self, request: str) -> dict[str, object]:
    """Sends a request and returns the answer.

    Raises:
      UserError: if the request ended the process.
    """
    with self._turn:
      if self._running is not None and self._running.poll() is not None:
        self.end()  # it was not this template that ended it
      running = self._running or self._start()
      assert running.stdin is not None
      assert running.stdout is not None
      try:
        running.stdin.write(request + "\n")
        running.stdin.flush()
        line = running.stdout.readline()
      except OSError:
        line = ""
      except BaseException:
        self.end()  # an unread answer would be taken for the next one's
        raise
      if not line:
        self.end()
        raise UserError(
          f"the chat template takes more than {SECONDS} s of CPU time for one chat, or crashes its process"
        )
    answer: dict[str, object] = json.loads(line)
    return answer

  def _start(self) -> subprocess.Popen[str]:
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin]
    program = str(Path(__file__).with_name("template_process.py"))
    limits = [str(value) for value in (SECONDS, MEMORY, CHARACTERS)]
    # -I: import nothing from the current folder or the environment
    command = [sys.executable, "-I", program, *limits, *folders]
    self._running = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    )
    atexit.register(self.end)
    return self._running

  def end(self) -> None:
    """Ends the process if it is running."""
    atexit.unregister(self.end)
    if self._running is not None and self.owner == os.getpid():
      self._running.kill()
      self._running.communicate()
    self._running = None


_processes = [_Process()]


def _process() -> _Process:
  """This process's renderer; one inherited by a fork answers the parent."""
  if _processes[-1].owner != os.getpid():
    _processes.append(_Process())
  return _processes[-1]
