"""``sa-jax export``: a model into a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import console
from sa_jax.cli.progress import progress


@dataclasses.dataclass(frozen=True)
class Export:
  """Export a model as a Hugging Face folder. A model with followers includes its PyTorch code."""

  src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
  """The model: an sa_jax checkpoint, a Hugging Face folder, a GGUF file or a hub id such as org/model."""
  dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
  """The folder to write, which must not exist."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the source's plan."""
  revision: str | None = None
  """For a hub id: a branch, tag or commit."""

  def run(self) -> None:
    """Exports."""
    from sa_jax.formats import export
    from sa_jax.formats.extras import read_json

    with progress(f"exporting {Path(self.src).name}") as report:
      export(self.src, self.dst, plan=self.plan, revision=self.revision, progress=report)
    family = read_json(self.dst / "config.json")["model_type"]
    shared = (self.dst / "modeling_shared_attention.py").exists()
    remedy = "AutoModelForCausalLM.from_pretrained" + ("(…, trust_remote_code=True)" if shared else "(…)")
    if family in ("baichuan", "internlm2"):
      remedy += ", after adding the original folder's code and auto_map"
    size = sum(file.stat().st_size for file in self.dst.rglob("*") if file.is_file())
    console.print(f"{self.dst}: {size / 1e6:.1f} MB; open with {remedy}")
