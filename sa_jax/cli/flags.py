"""Flags: values written as one word, and error messages that name flags instead of fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import tyro

from sa_jax.errors import UserError, near
from sa_jax.files import as_path
from sa_jax.mesh import MeshSizes

SPELT = {MeshSizes: "data=2,fsdp=4"}
"""Flag types written as one word, each with an example: ``parse`` reads it, ``str`` writes it."""

registry = tyro.constructors.ConstructorRegistry()
"""Registers them with tyro."""


@registry.primitive_rule
def _spelt(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[MeshSizes] | None:
  kind = next((kind for kind in SPELT if kind is info.type), None)
  if kind is None:
    return None
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=SPELT[kind],
    instance_from_str=lambda words: kind.parse(words[0]),
    is_instance=lambda value: isinstance(value, kind),
    str_from_instance=lambda value: [str(value)],
  )


@registry.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
  """A path may be ``gs://bucket/file``, from which pathlib would drop a slash."""
  if info.type is not Path:
    return None
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda words: as_path(words[0]),
    is_instance=lambda value: isinstance(value, PurePath),
    str_from_instance=lambda value: [str(value)],
  )


@registry.primitive_rule
def _optional(
  info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[object] | tyro.constructors.UnsupportedTypeAnnotationError | None:
  """Shows an optional one-word value as the word."""
  parts = typing.get_args(info.type)
  if info.type_origin not in (typing.Union, types.UnionType) or len(parts) != 2 or types.NoneType not in parts:
    return None
  (kind,) = (part for part in parts if part is not types.NoneType)
  inner = tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers)
  spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(inner)
  if isinstance(spec, tyro.constructors.UnsupportedTypeAnnotationError):
    return spec
  if spec.nargs != 1 or spec.choices is not None:
    return None
  return dataclasses.replace(
    spec,
    instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
    is_instance=lambda value: value is None or spec.is_instance(value),
    str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
  )


@registry.primitive_rule
def _several(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[object] | None:
  """Shows several values that are none by default as ``none``; tyro would show nothing."""
  parts = typing.get_args(info.type)
  if info.type_origin is not tuple or len(parts) != 2 or parts[1] is not Ellipsis:
    return None
  inner = tyro.constructors.PrimitiveTypeInfo.make(parts[0], info.markers)
  spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(inner)
  if isinstance(spec, tyro.constructors.UnsupportedTypeAnnotationError) or spec.nargs != 1:
    return None

  def words_of(values: object) -> list[str]:
    assert isinstance(values, tuple)
    return [spec.str_from_instance(value)[0] for value in values] or ["none"]

  return tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar=f"[{spec.metavar} ...]",
    instance_from_str=lambda words: tuple(spec.instance_from_str([word]) for word in words),
    is_instance=lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
    str_from_instance=words_of,
    choices=spec.choices,
  )


def at_least_one(metavar: str) -> object:
  """Describes a required positional argument of several values, which tyro takes for an optional one."""
  return tyro.conf.arg(metavar=f"{metavar} ...", help_behavior_hint="(required)")


def fitted_help(text: str, width: int) -> str:
  """A command's help, with its usage and description, which tyro does not wrap, wrapped to the width.

  What is no help, such as a script for a shell's completion, stays as it is.
  """
  if "usage:" not in text.partition("\n")[0]:
    return text
  lines = text.split("\n")
  end = next((at for at, line in enumerate(lines) if re.match(r"(\x1b\[[\d;]*m)*[ ╭]", line)), 0)
  fill = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
  plain = (re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines[:end])  # tyro styles each word
  head = [fill(line, subsequent_indent="  " if line.startswith("usage:") else "") for line in plain]
  return "\n".join(head + lines[end:])


def fields_of(command: Callable[..., Any]) -> dict[str, object]:
  """A command's flags as fields with types, including those of nested dataclasses."""
  if isinstance(command, functools.partial):
    command = command.func
  fields: dict[str, object] = {}
  hints = typing.get_type_hints(command, include_extras=True)
  for name in inspect.signature(command).parameters:
    hint = hints[name]
    if tyro.conf.Suppress in getattr(hint, "__metadata__", ()):
      continue
    hint = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    kinds = filter(inspect.isclass, (hint, *typing.get_args(hint)))
    inner = [kind for kind in kinds if dataclasses.is_dataclass(kind) and kind not in SPELT]
    for kind in inner:
      fields |= fields_of(kind)
    if not inner:
      fields[name] = hint
  return fields


def check_flags(command: str, given: Sequence[str], fields: Mapping[str, object]) -> None:
  """Checks that the command has all given flags, and that flags with several values have at least one.

  For an unknown flag, tyro would first report missing arguments; and it accepts flags without values.

  Args:
    command: its name.
    given: its arguments.
    fields: see `fields_of`.

  Raises:
    UserError: for an unknown flag, with similar names; for a flag without a value.
  """
  dashed = {f"--{name.replace('_', '-')}": kind for name, kind in fields.items()}
  known = {"--help", *dashed} | {flag.replace("--", "--no-", 1) for flag, kind in dashed.items() if kind is bool}
  words = [*itertools.takewhile(lambda word: word != "--", given), "--"]
  for word, following in itertools.pairwise(words):
    flag = word.partition("=")[0].replace("_", "-")
    if re.match("--[a-z]", flag) and flag not in known and not flag.startswith("--tyro-"):
      raise UserError(f"sa-jax {command} has no flag {flag}{near(flag, sorted(known))}; --help lists them")
    if typing.get_origin(dashed.get(word.replace("_", "-"))) is tuple and following.startswith("--"):
      raise UserError(f"{flag} has no value: give at least one, or leave it out")
  for at, word in enumerate(given):
    # `--mesh data=2 fsdp=4`: the second word would be parsed as another argument.
    if word.partition("=")[0] != "--mesh":
      continue
    sizes = [*word.split("=", 1)[1:], *itertools.takewhile(_is_size, given[at + 1 :])]
    if len(sizes) > 1:
      joined = ",".join(size.strip(",") for size in sizes if size != ",")
      raise UserError(f"join mesh sizes with commas: --mesh {joined}")


def _is_size(word: str) -> bool:
  return re.fullmatch(r"[a-z]+=\d+,?|,", word) is not None


def explain(text: str, fields: Collection[str]) -> str:
  """An error message with `field`, `field=value` or two_words replaced by ``--field``, ``--field value``.

  Args:
    text: the message of a `sa_jax.UserError`.
    fields: see `fields_of`.
  """
  # Quoted user input stays unchanged.
  typed = r"(?<!\w)(?<![=])(?:'[^'\n]*'|\"[^\"\n]*\")(?!\w)"
  quoted = r"`(?P<quoted>\w+)(?:=(?P<value>[^`]*))?`"
  plain = r"(?<![\w.`/-])(?P<plain>[a-z]\w*)=(?P<of>'[^'\n]*'|[\w.+-]+)"
  words = r"(?<![\w.`/-])(?P<words>[a-z]+(?:_[a-z]+)+)(?![\w(./-])"

  def flag(match: re.Match[str]) -> str:
    name = match["quoted"] or match["plain"] or match["words"]
    if name is None or name not in fields:
      return match[0]
    value = match["value"] if match["quoted"] else match["of"]
    dashed = name.replace("_", "-")
    if value in ("True", "False"):
      return f"--{dashed}" if value == "True" else f"--no-{dashed}"
    return f"--{dashed}" if value is None else f"--{dashed} {value}"

  return re.sub(f"{typed}|{quoted}|{plain}|{words}", flag, text)
