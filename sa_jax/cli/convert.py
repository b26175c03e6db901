"""``sa-jax convert``: convert a checkpoint to sa_jax's format."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax import display
from sa_jax.cli.common import console, show_table
from sa_jax.cli.progress import progress
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError

if TYPE_CHECKING:
  from sa_jax.formats.table import Account


@dataclasses.dataclass(frozen=True)
class Convert:
  """Convert a Hugging Face folder, a hub id or a GGUF file to an sa_jax checkpoint."""

  src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
  """The model to read: a folder, a GGUF file or a hub id such as org/model."""
  dst: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="DST")] = None
  """The folder to write, which must not exist. Not needed with --inspect."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; followers' queries and keys are dropped. None for the source's plan."""
  dtype: FloatDtype | None = "bfloat16"
  """Type of the stored parameters; None keeps the source's."""
  revision: str | None = None
  """For a hub id: a branch, tag or commit."""
  strict: bool = False
  """Refuse a config.json with unknown keys; otherwise a warning lists them."""
  inspect: bool = False
  """Show the checkpoint's tensors and what the plan would drop, without reading the weights."""

  def run(self) -> None:
    """Converts, or inspects."""
    from sa_jax.formats import convert, inspect

    if self.inspect:
      self._tell(inspect(self.src, self.plan, revision=self.revision, strict=self.strict))
      return
    if self.dst is None:
      raise UserError("name the folder to write: sa-jax convert SRC DST")
    with progress(f"converting {Path(self.src).name}") as report:
      convert(self.src, self.dst, self.plan, self.dtype, revision=self.revision, strict=self.strict, progress=report)
    size = sum(file.stat().st_size for file in self.dst.rglob("*") if file.is_file())
    console.print(
      f"{self.dst}: {size / 1e6:.1f} MB, plan {self.plan or 'as in the source'}, {self.dtype or 'source dtype'}"
    )

  def _tell(self, found: Account) -> None:
    """Prints tensors by kind, dropped ones first."""
    if dropped := [[kind, *of, reason] for kind, of, reason in _kinds(found.dropped)]:
      title = f"{Path(self.src).name}: {display.count(len(found.dropped), 'tensor')} dropped"
      show_table(title, ["tensor", "count", "layers", "why"], dropped)
    used = {entry.key: "×".join(map(str, entry.shape)) for entry in found.used}  # some are parts of a tensor
    title = f"{Path(self.src).name}: {display.count(len(used), 'tensor')} used"
    show_table(title, ["tensor", "count", "layers", "shape"], [[kind, *of, shape] for kind, of, shape in _kinds(used)])


def _kinds(tensors: dict[str, str]) -> list[tuple[str, tuple[str, str], str]]:
  """Groups tensors by value and name without layer number: name, (count, layers), value."""
  layers: dict[tuple[str, str], list[int]] = {}
  for name, value in tensors.items():
    number = re.search(r"(?<=[./])\d+(?=[./])", name)
    kind = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
    # A reason also names a layer, which is already in the layer list.
    value = re.sub(r"^layer \d+ follows layer \d+$", "followers", value)
    layers.setdefault((kind, value), []).extend([] if number is None else [int(number[0])])
  return [(kind, (str(len(of) or 1), _spans(of)), value) for (kind, value), of in layers.items()]


def _spans(numbers: list[int]) -> str:
  """Such as ``0-3, 7``."""
  numbers = sorted(numbers)
  spans: list[list[int]] = []
  for number in numbers:
    if spans and number <= spans[-1][1] + 1:
      spans[-1][1] = number
    else:
      spans.append([number, number])
  return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
