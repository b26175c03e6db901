"""Jinja as transformers renders chat templates with it (`transformers.utils.chat_template_utils`)."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
  """``{% generation %}``, which marks what an assistant says: it is rendered as if it were not there."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> list[nodes.Node]:
    """The statements between the tags."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def environment() -> jinja2.Environment:
  """What templates are compiled in."""
  made = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
  )
  made.filters["tojson"] = _to_json
  made.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
  return made


def _to_json(value: Any, **how: Any) -> str:
  """Without the escapes for HTML that Jinja's own has."""
  return json.dumps(value, **{"ensure_ascii": False} | how)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)
