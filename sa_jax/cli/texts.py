"""Shared by the subcommands that need calibration text: reading texts and cutting them into rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa_jax.display import count
from sa_jax.errors import UserError
from sa_jax.files import read_text

if TYPE_CHECKING:
  from sa_jax import Tokenizer
  from sa_jax.analysis import Text
  from sa_jax.config import ModelConfig


_LISTED = 20
"""Maximum lines of an error message."""


@dataclasses.dataclass(frozen=True)
class RowLength:
  """How rows are cut from texts."""

  length: int = 512
  """Tokens per row, including the start token."""
  start_token: str = "auto"
  """First token of every row: auto for the one that the tokenizer adds, none, or a token."""

  def opening(self, tokenizer: Tokenizer) -> list[int]:
    """The tokens that every row begins with."""
    return tokenizer.opening(self.start_token)

  def describe(self, tokenizer: Tokenizer, rows: int | None = None) -> str:
    """Such as ``4 rows of 512 tokens, start token <bos>``; without the number if that is None."""
    opening = tokenizer.decode(self.opening(tokenizer), special=True)
    of = "rows" if rows is None else count(rows, "row")
    return f"{of} of {self.length} tokens" + (f", start token {opening}" if opening else "")

  def cut(self, tokenizer: Tokenizer, text: str, rows: int | None) -> np.ndarray:
    """The first rows of a text, int32 ``[rows, length]``; None for all complete rows."""
    from sa_jax import rows_of

    return rows_of(tokenizer.encode(text, special=False), self.length, rows, self.opening(tokenizer))


def read_strings(path: Path, key: str) -> list[str]:
  """A text file, or the string at a key of every line of a ``.jsonl`` file.

  Raises:
    UserError: if it cannot be read or a line has no such string.
  """
  contents = read_text(path)
  if path.suffix != ".jsonl":
    return [contents]
  # Not splitlines, which also splits at characters that are allowed in JSON strings.
  found = {number: _string(line, key) for number, line in enumerate(contents.split("\n"), 1) if line.strip()}
  if wrong := [number for number, text in found.items() if text is None]:
    faults = [f"line {number} is not a JSON object with a {key!r} string" for number in wrong]
    raise UserError.of(str(path), faults[:_LISTED])
  return [text for text in found.values() if text is not None]


def _string(line: str, key: str) -> str | None:
  try:
    value = json.loads(line)
  except ValueError:
    return None
  text = value.get(key) if isinstance(value, dict) else None
  return text if isinstance(text, str) else None


def read_documents(path: Path) -> str:
  """A text file, or the ``text`` fields of a ``.jsonl`` file with blank lines between them; see `read_strings`."""
  return "\n\n".join(read_strings(path, "text"))


def rows_of_texts(
  tokenizer: Tokenizer, files: Sequence[Path], cutting: RowLength, rows: int | None
) -> list[np.ndarray]:
  """The first rows of each file, int32 ``[rows, length]`` each.

  Raises:
    UserError: if there is no file, or one is too short.
  """
  if not files:
    raise UserError("name at least one text file")
  out = []
  for file in files:
    try:
      out.append(cutting.cut(tokenizer, read_documents(file), rows))
    except UserError as error:
      raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
  return out


def split_texts(
  tokenizer: Tokenizer,
  files: Sequence[Path],
  cutting: RowLength,
  calibration: int,
  judging: int,
  all_rows: bool = False,
) -> list[Text]:
  """Splits each file into rows for calibration and held-out rows, which follow them.

  A shorter file uses all its rows, a fifth of them held out. With ``all_rows``, the remaining rows of longer files are
  added to the calibration rows.

  Raises:
    UserError: if a file is too short, or two have the same name.
  """
  from sa_jax.analysis import Text

  names = [file.stem for file in files]
  if len(set(names)) < len(names):
    raise UserError(f"texts need different file names, not {', '.join(names)}")
  cut = []
  for rows in rows_of_texts(tokenizer, files, cutting, None):
    used = rows[: calibration + judging]
    held_out = judging if len(used) == calibration + judging else min(judging, max(1, len(used) // 5))
    further = rows[len(used) :] if all_rows else rows[:0]
    cut.append((np.concatenate([used[:-held_out], further]), used[-held_out:]))
  if short := [str(file) for file, (fitted, _) in zip(files, cut, strict=True) if not len(fitted)]:
    raise UserError(f"each text needs two rows, one to fit and one held out; {', '.join(short)} has one")
  return [Text(name, *each) for name, each in zip(names, cut, strict=True)]


def rows_at_once(config: ModelConfig, length: int) -> int:
  """Rows per batch: few on a CPU; on an accelerator, 2 GB of logits."""
  import jax

  return 4 if jax.default_backend() == "cpu" else max(1, min(32, 2**31 // (4 * length * config.vocab_size)))
