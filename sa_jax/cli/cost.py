"""``sa-jax cost``: count what a plan saves."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import change, parameters, show_table, write_json
from sa_jax.config import PRESETS, ModelConfig
from sa_jax.costs import Cost, cost
from sa_jax.display import quantity
from sa_jax.errors import UserError, near
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_writable
from sa_jax.plan import SharingPlan, as_plan


def rows_of_cost(dense: Cost, shared: Cost) -> list[list[str]]:
  """Table rows: dense, shared, and the change."""
  rows = []
  for name, (label, unit) in dense.labels.items():
    old, new = getattr(dense, name), getattr(shared, name)
    show = parameters if name in ("params", "active_params") else functools.partial(quantity, unit=unit)
    rows.append([label, show(old), show(new), change(new, old)])
  return rows


@dataclasses.dataclass(frozen=True)
class CostOf:
  """Count parameters, FLOPs and cache bytes of a model, dense and under a plan."""

  model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
  """A preset (gpt-oss-20b, llama-2-7b, llama-2-13b, llama-3-8b, mixtral-8x7b, smollm2-135m),
  or a folder, a GGUF file, a checkpoint or a hub id."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the model's own plan, dense for a preset."""
  batch_size: Count = 1
  """Rows."""
  length: Count = 4096
  """Tokens per row."""
  revision: str | None = None
  """For a hub id: a branch, tag or commit."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def __post_init__(self) -> None:
    check_fields(self, "cost")

  def run(self) -> None:
    """Prints the table."""
    check_writable(self.json)
    config, own = model_of(self.model, self.revision)
    plan = own if self.plan is None else as_plan(self.plan, config.num_layers)
    dense, shared = cost(config, None, self.batch_size, self.length), cost(config, plan, self.batch_size, self.length)
    title = f"{self.model}, {self.batch_size} × {self.length} tokens, {config.dtype}"
    columns, rows = ["", "dense", str(plan), "change"], rows_of_cost(dense, shared)
    some = slice(None) if plan.followers else slice(2)  # comparing a dense model with itself is pointless
    show_table(title, columns[some], [row[some] for row in rows])
    write_json(self.json, {"model": self.model, "plan": str(plan), "dense": dense, "shared": shared})


def model_of(model: str, revision: str | None = None) -> tuple[ModelConfig, SharingPlan]:
  """The config of a preset or a model, and its plan, dense if it has none.

  Raises:
    UserError: if the name is neither.
  """
  from sa_jax.formats.source import model_of, open_source

  if model in PRESETS and revision is None:
    return PRESETS[model], SharingPlan.dense(PRESETS[model].num_layers)
  if model in PRESETS:
    raise UserError(f"`revision={revision}` is for models on the hub, but {model} is a preset: leave it out")
  try:
    source = open_source(model, revision, "config")
  except UserError as error:
    faults = [f"it is not a preset ({', '.join(sorted(PRESETS))}){near(model, PRESETS)}", str(error)]
    raise UserError.of(f"the model {model!r} cannot be opened", faults) from None
  return model_of(source)
