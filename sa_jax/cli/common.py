"""Shared by subcommands: tables, JSON, formatted numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sa_jax import display
from sa_jax.files import write_text


class _Screen(Console):
  def on_broken_pipe(self) -> NoReturn:
    raise BrokenPipeError  # handled by `main`; rich would exit with 1, the code for bugs


console = _Screen(highlight=False, markup=False, emoji=False)  # prints file names unchanged
if not console.is_terminal and "COLUMNS" not in os.environ:
  console.width = 160  # a file or a pipe has no width, and rich would fold tables to 80 columns


def silence() -> None:
  """Stops all processes but the first from printing and writing."""
  import jax

  # Reading the process index would initialise JAX's devices, which a single process does not need yet.
  console.quiet = jax.distributed.is_initialized() and jax.process_index() > 0


def is_first() -> bool:
  """Whether this process prints and writes."""
  return not console.quiet


def say(text: str, end: str = "\n") -> None:
  """Prints a model's text unchanged: rich would expand tabs and emoji names."""
  if is_first():
    print(text, end=end, flush=True)


def tell(about: str, found: object) -> None:
  """Prints a result, or where it was written."""
  console.print(Text.assemble(f"{about}: ", (str(found), "bold")), soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table: the first column names the row, the others are numbers.

  If the terminal is too narrow, prints one number per line, because a table would drop numbers.
  """
  console.print(title, style="bold")  # not as the table's title, which is wrapped to its width
  if _narrowest(rows) > console.width:
    for name, *cells in rows:
      console.print(name, style="bold", soft_wrap=True)
      for column, cell in zip(columns[1:], cells, strict=True):
        if cell:
          console.print(f"  {column}: {cell}", soft_wrap=True)
    return
  table = Table()
  for index, column in enumerate(columns):
    table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
  for row in rows:
    table.add_row(*row)
  console.print(table)


def _narrowest(rows: Sequence[Sequence[str]]) -> int:
  """The minimum width of a table: whole names, and the longest word of other cells."""
  names, *others = zip(*rows) if rows else [()]
  widths = [max(map(cell_len, names), default=0)]
  widths += [max(cell_len(word) for cell in column for word in ["", *cell.split()]) for column in others]
  return sum(width + 3 for width in widths) + 1


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """The table that `show_table` prints, as Markdown."""
  line = lambda cells: "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
  sides = [":--", *("--:" for _ in columns[1:])]
  return f"{title}\n\n{line(columns)}{line(sides)}" + "".join(map(line, rows))


def write_json(path: Path | None, values: Any) -> None:
  """Writes values, including dataclasses, to a JSON file, if requested and on the first process.

  Raises:
    UserError: if the file cannot be written.
  """
  if path is None or not is_first():
    return
  write_text(path, json.dumps(values, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return dataclasses.asdict(value)
  return str(value)


@contextlib.contextmanager
def exact_float32(dtype: str = "float32") -> Iterator[None]:
  """Computes float32 products exactly, as a context or decorator: GPUs and TPUs round them by default.

  Does nothing for another compute ``dtype``.
  """
  import jax

  if dtype != "float32":
    yield
    return
  with jax.default_matmul_precision("highest"):
    yield


def plans_asked(words: Sequence[str]) -> tuple[str | None, ...]:
  """Plans from a flag that takes several; None, the model's own plan, for the word None and if there is no word."""
  return tuple(None if word == "None" else word for word in words) or (None,)


def parameters(count: float) -> str:
  """A parameter count such as ``13.0 B``."""
  return display.quantity(count).replace("G", "B")


def change(new: float, old: float) -> str:
  """The relative change from old to new, in per cent."""
  return "=" if new == old else f"{100 * (new / old - 1):+.1f} %"
