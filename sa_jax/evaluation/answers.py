"""Stores answers to lm-eval's requests in a file, so that no request is computed twice."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from sa_jax.errors import UserError
from sa_jax.files import make_folder, named

T = TypeVar("T")


class Request(NamedTuple):
  """A request: the name of lm-eval's method, its arguments, and the task."""

  kind: str
  arguments: tuple[object, ...]
  task: str | None

  @property
  def is_sampled(self) -> bool:
    """Whether the answer is random."""
    return any(isinstance(each, dict) and bool(each.get("do_sample")) for each in self.arguments)


class Answers:
  """Answers by request, in a JSON lines file that grows after each task.

  Attributes:
    path: the file.
  """

  def __init__(self, path: Path, asked_of: Mapping[str, object]):
    """Reads the stored answers.

    Args:
      path: the file; created with the first answer.
      asked_of: identifies the model; stored in the file's first line.

    Raises:
      UserError: if the file is unreadable, or holds another model's answers.
    """
    self.path = path
    self._asked_of = json.loads(json.dumps(asked_of))
    self._known: dict[str, object] = {}
    self._is_torn = False
    if path.exists():
      self._read()

  def __len__(self) -> int:
    return len(self._known)

  def answer(self, requests: Sequence[Request], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Answers to requests, in their order.

    Args:
      requests: all of the same kind.
      work: answers the requests with the given indices, all of one task; its answers are stored before the next call.

    Raises:
      UserError: if the file cannot be written.
    """
    keys = list(_keys(requests))
    for _, numbers in itertools.groupby(range(len(requests)), key=lambda number: requests[number].task):
      # Equal requests share one answer.
      new = list({keys[number]: number for number in numbers if keys[number] not in self._known}.values())
      if new:
        self._add([keys[number] for number in new], work(new))
    return [cast(T, _plain(self._known[key])) for key in keys]

  def _add(self, keys: Sequence[str], values: Sequence[object]) -> None:
    kept = dict(zip(keys, values, strict=True))
    lines = [] if self.path.exists() else [json.dumps(self._asked_of)]
    lines += [json.dumps({"request": key, "answer": value}) for key, value in kept.items()]
    with named(self.path, "write"), self.path.open("a", encoding="utf-8") as file:
      file.write(("\n" if self._is_torn else "") + "".join(line + "\n" for line in lines))
    self._is_torn = False
    self._known |= kept

  def _read(self) -> None:
    with named(self.path):
      first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
      if not lines:  # a killed process wrote half of the first line
        self.path.unlink()
        return
    if _parsed(first) != self._asked_of:
      raise UserError(f"{self.path} does not contain answers of {self._asked_of}; use another folder")
    self._is_torn = bool(lines and lines[-1])  # a killed process wrote half a line
    for line in lines:
      value = _parsed(line)
      if isinstance(value, dict) and value.keys() == {"request", "answer"}:
        self._known[value["request"]] = value["answer"]


def answers_in(folder: Path, asked_of: Mapping[str, object]) -> Answers:
  """The answers of one model and plan, in a folder that may hold others.

  Raises:
    UserError: if the folder cannot be created or written, or the file is unreadable.
  """
  make_folder(folder)
  digest = hashlib.sha256(json.dumps(asked_of, sort_keys=True).encode()).hexdigest()
  return Answers(folder / f"answers-{digest[:16]}.jsonl", asked_of)


def fingerprint(path: Path) -> str:
  """Identifies a model's files: a digest of their contents and names.

  Args:
    path: a folder, or a file; for a file split into parts, all parts, which share its name up to ``-00001-of-``.

  Raises:
    UserError: if a file is unreadable.
  """
  if path.is_dir():
    files = sorted(file for file in path.rglob("*") if file.is_file())
  else:
    begin, is_part, _ = path.name.rpartition("-00001-of-")
    files = sorted(path.parent.glob(f"{begin}-*-of-*")) if is_part else [path]
  digest = hashlib.sha256()
  for file in files:
    digest.update(str(file.relative_to(path)).encode() if path.is_dir() else b"")
    with named(file), file.open("rb") as stream:
      digest.update(hashlib.file_digest(stream, "sha256").digest())
  return digest.hexdigest()


def _keys(requests: Sequence[Request]) -> Iterator[str]:
  """One key per request; equal sampled requests get different keys, because their answers differ."""
  seen: dict[str, int] = {}
  for request in requests:
    text = json.dumps([request.kind, *request.arguments], sort_keys=True)
    if request.is_sampled:
      seen[text] = seen.get(text, -1) + 1
      text += str(seen[text])
    yield hashlib.sha256(text.encode()).hexdigest()


def _parsed(line: str) -> object:
  try:
    return json.loads(line)
  except ValueError:
    return None


def _plain(value: object) -> object:
  """An answer in lm-eval's types: JSON has no tuples."""
  return tuple(value) if isinstance(value, list) else value
