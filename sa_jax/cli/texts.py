"""What the subcommands that need calibration text share: reading it, opening the dense model, saving the result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_jax.cli.common import progress
from sa_jax.errors import UserError
from sa_jax.files import read_text
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax import Transformer
  from sa_jax.analysis import Text


def read_documents(path: Path) -> str:
  """A text file, or the ``text`` fields of a ``.jsonl`` file with blank lines between them.

  Raises:
    UserError: if it cannot be read or a line has no ``text``.
  """
  contents = read_text(path)
  if path.suffix != ".jsonl":
    return contents
  documents = []
  # Not splitlines, which also splits at characters that JSON strings may hold.
  for number, line in enumerate(contents.split("\n"), 1):
    if not line.strip():
      continue
    try:
      documents.append(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
      raise UserError(f"{path}, line {number}, is not a JSON object with a 'text'") from None
  return "\n\n".join(documents)


def open_dense(path: Path) -> tuple[Transformer, dict[str, Any]]:
  """The dense model in float32, in the layer layout."""
  from sa_jax import from_pretrained

  with progress(f"opening {path.name}") as report:
    return from_pretrained(path, "dense", "float32", layout="layers", progress=report)


def rows_of_texts(model: Path, files: Sequence[Path], length: int, rows: int) -> list[Any]:
  """The first rows of each file, int32 ``[rows, length]`` each.

  Raises:
    UserError: if there is no file, or one is too short.
  """
  from sa_jax import load_tokenizer, rows_of

  if not files:
    raise UserError("name at least one text file to calibrate on")

  tokenizer = load_tokenizer(model)
  out = []
  for file in files:
    try:
      out.append(rows_of(tokenizer.encode(read_documents(file)), length, rows))
    except ValueError as error:
      raise UserError(f"{file}: {error}") from None
  return out


def split_texts(model: Path, files: Sequence[Path], length: int, calibration: int, judging: int) -> list[Text]:
  """The first rows of each file to calibrate on, the next ones to judge by.

  Raises:
    UserError: if a file is too short, or two have one name.
  """
  from sa_jax.analysis import Text

  names = [file.stem for file in files]
  if len(set(names)) < len(names):
    raise UserError(f"texts need different file names, not {', '.join(names)}")
  rows = rows_of_texts(model, files, length, calibration + judging)
  return [Text(name, each[:calibration], each[calibration:]) for name, each in zip(names, rows, strict=True)]


def save(path: Path, source: Path, model: Transformer, params: Params, dtype: str) -> None:
  """Writes a checkpoint in a dtype, with the source's tokenizer and what else travels with a model.

  Raises:
    UserError: if the folder exists.
  """
  import jax
  import jax.numpy as jnp

  from sa_jax.formats.checkpoint import save_checkpoint
  from sa_jax.formats.source import open_source

  save_checkpoint(
    path,
    dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype),
    model.plan,
    jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params),
    open_source(source).save_extras,
  )


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
  """One progress bar after another: yields a function from a stage's name to what reports (done, in all)."""
  with contextlib.ExitStack() as current:

    def begin(name: str) -> Callable[[int, int], None]:
      current.close()
      return current.enter_context(progress(name))

    yield begin
