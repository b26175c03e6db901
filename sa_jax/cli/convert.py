"""``sa-jax convert``: a checkpoint of PyTorch's world into one of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import console, progress, show_table
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Convert:
  """Convert a Hugging Face folder or a GGUF file into an sa_jax checkpoint."""

  src: tyro.conf.Positional[str]
  """The model to read: a folder, a GGUF file or a hub id such as org/model."""
  dst: tyro.conf.Positional[Path | None] = None
  """The folder to write; it must not exist. Not needed with --inspect."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; queries and keys of followers are dropped. None keeps the model dense."""
  dtype: FloatDtype | None = "bfloat16"
  """Type of the stored parameters; None keeps the source's."""
  revision: str | None = None
  """Of a hub id: a branch, tag or commit."""
  strict: bool = False
  """Refuse a config.json with keys of which nobody knows what they do; otherwise a warning lists them."""
  inspect: bool = False
  """Say what the checkpoint holds and what the plan would drop, without reading the weights."""

  def run(self) -> None:
    """Converts, or inspects."""
    from sa_jax.formats import convert, inspect

    if self.inspect:
      found = inspect(self.src, self.plan, revision=self.revision, strict=self.strict)
      used = {entry.key: entry.shape for entry in found.used}  # several parameters may be parts of one tensor
      rows = [[key, "×".join(map(str, shape)), "used"] for key, shape in used.items()]
      rows += [[key, "", f"dropped: {reason}"] for key, reason in found.dropped.items()]
      show_table(f"{self.src}: {len(used)} tensors used, {len(found.dropped)} dropped", ["tensor", "shape", ""], rows)
      return
    if self.dst is None:
      raise UserError("name the folder to write: sa-jax convert SRC DST")
    with progress(f"converting {Path(self.src).name}") as report:
      convert(self.src, self.dst, self.plan, self.dtype, revision=self.revision, strict=self.strict, progress=report)
    size = sum(file.stat().st_size for file in self.dst.rglob("*") if file.is_file())
    console.print(
      f"{self.dst}: {size / 1e6:.1f} MB, plan {self.plan or 'as in the source'}, {self.dtype or 'source dtype'}"
    )
