"""``sa-jax push``: a model to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import console
from sa_jax.cli.progress import progress


@dataclasses.dataclass(frozen=True)
class Push:
  """Export a model and upload it to the Hugging Face hub. A model with followers includes its PyTorch code."""

  src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
  """The model: an sa_jax checkpoint, a Hugging Face folder, a GGUF file or a hub id such as org/model."""
  hub_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ORG/MODEL")]
  """The repository; created if it does not exist."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the source's plan."""
  private: bool = False
  """Make a new repository private."""
  branch: str | None = None
  """The branch to commit to; None for the main branch."""

  def run(self) -> None:
    """Exports and uploads."""
    from sa_jax.formats.push import push

    with progress(f"exporting {Path(self.src).name}") as report:
      url = push(
        self.src, self.hub_id, plan=self.plan, private=self.private, branch=self.branch, progress=report
      )  # fmt: skip
    console.print(f"{self.hub_id}: {url}")
