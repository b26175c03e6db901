"""``sa-jax cost``: what a plan saves, counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import change, quantity, show_table, write_json
from sa_jax.config import PRESETS, ModelConfig
from sa_jax.cost import Cost, cost
from sa_jax.plan import as_plan

LABELS = {
  "params": ("parameters", ""),
  "param_bytes": ("parameter bytes", "B"),
  "flops": ("FLOPs of a forward pass", ""),
  "decode_flops": ("FLOPs of a decode step", ""),
  "kv_bytes_per_token": ("KV cache bytes a token", "B"),
  "kv_cache_bytes": ("KV cache bytes", "B"),
  "decode_bytes": ("bytes read by a decode step", "B"),
}


def rows_of_cost(dense: Cost, shared: Cost) -> list[list[str]]:
  """Table rows: dense, under the plan, and the change."""
  rows = []
  for name, (label, unit) in LABELS.items():
    old, new = getattr(dense, name), getattr(shared, name)
    rows.append([label, quantity(old, unit), quantity(new, unit), change(new, old)])
  return rows


@dataclasses.dataclass(frozen=True)
class CostOf:
  """Count parameters, FLOPs and cache bytes of a model, dense and under a plan."""

  model: tyro.conf.Positional[str]
  """A preset (llama-2-7b, llama-2-13b, llama-3-8b, smollm2-135m), or a folder with a config.json."""
  plan: Annotated[str, tyro.conf.arg(metavar="PLAN")] = "dense"
  """Which layers share, such as 22:23-26."""
  batch: int = 1
  """Rows."""
  seq_len: int = 4096
  """Tokens a row."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def run(self) -> None:
    """Prints the table."""
    config = config_of(self.model)
    plan = as_plan(self.plan, config.num_layers)
    dense, shared = cost(config, None, self.batch, self.seq_len), cost(config, plan, self.batch, self.seq_len)
    title = f"{self.model}, {self.batch} × {self.seq_len} tokens, {config.dtype}"
    show_table(title, ["", "dense", str(plan), "change"], rows_of_cost(dense, shared))
    write_json(self.json, {"model": self.model, "plan": str(plan), "dense": dense, "shared": shared})


def config_of(model: str) -> ModelConfig:
  """The config of a preset or of a folder with a ``config.json``.

  Raises:
    ValueError: if the name is neither.
  """
  if model in PRESETS:
    return PRESETS[model]
  file = Path(model) / "config.json"
  if not file.exists():
    raise ValueError(f"{model!r} is not a preset ({', '.join(sorted(PRESETS))}) and not a folder with a config.json")
  return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
