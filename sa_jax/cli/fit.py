"""``sa-jax fit``: check whether a program fits on a TPU slice, by compiling it ahead of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import change, console, show_table, write_json
from sa_jax.cli.cost import model_of
from sa_jax.cli.progress import progress
from sa_jax.config import FloatDtype, RematPolicy
from sa_jax.display import quantity
from sa_jax.files import check_writable
from sa_jax.fit import Fit, Job, Kind, fit, mesh_on
from sa_jax.hlo import Collective
from sa_jax.mesh import MeshSizes
from sa_jax.plan import as_plan


def rows_of_fit(fits: list[Fit]) -> list[list[str]]:
  """Table rows: one column per program, and the change from the first to the second."""

  def cell(value: float | None, unit: str) -> str:
    if value is None:
      return "-"
    return f"{1000 * value:,.1f} ms" if unit == "s" else quantity(value, unit)

  def row(label: str, values: Sequence[float | None], unit: str) -> list[str]:
    cells = [cell(value, unit) for value in values]
    known = [value for value in values if value is not None]
    compared = change(known[1], known[0]) if len(known) == 2 and known[0] else ""
    return [label, *cells, *([compared] if len(values) == 2 else [])]

  rows = [
    row("peak memory per device", [f.peak_bytes for f in fits], "B"),
    row("parameters, state, batch", [f.argument_bytes for f in fits], "B"),
    row("memory of a device", [f.hbm_bytes for f in fits], "B"),
  ]
  for kind in dict.fromkeys(each.kind for f in fits for each in f.collectives):
    found = [_by_kind(f).get(kind, Collective(kind, 0, 0)) for f in fits]
    rows.append(row(f"{kind}, times", [c.count for c in found], ""))
    rows.append(row(f"{kind}, bytes per device", [c.bytes for c in found], "B"))
  rows += [
    row("analytic: matrix products at peak rate", [f.compute_seconds for f in fits], "s"),
    row("analytic: memory traffic at peak rate", [f.memory_seconds for f in fits], "s"),
    row("analytic: at least (roofline)", [f.roofline_seconds for f in fits], "s"),
    row("compilation here, seconds", [round(f.compile_seconds, 1) for f in fits], ""),
  ]
  return rows


def _by_kind(result: Fit) -> dict[str, Collective]:
  return {collective.kind: collective for collective in result.collectives}


@dataclasses.dataclass(frozen=True)
class FitOf:
  """Compile a program for a TPU slice without having one; report peak memory, collectives and analytic time."""

  model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
  """A preset (gpt-oss-20b, llama-2-7b, llama-2-13b, llama-3-8b, mixtral-8x7b, smollm2-135m), or a folder with
  a config.json."""
  topology: str
  """The slice, such as v5e:16x16, v6e:4x4 or v5p:4x4x4."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the folder's own plan, dense for a preset."""
  kind: Kind = "train"
  """train: a training step; prefill; decode: one decode step; loop: generate's token loop; perplexity; scoring: a batch
  of eval; calibration: a batch of share."""
  mesh: MeshSizes = MeshSizes()
  """The device mesh, such as fsdp=64,tensor=4; remaining chips go to data."""
  batch_size: int | None = None
  """Global batch size; None for one row per data shard."""
  length: int = 4096
  """Tokens per row; for decode and loop, cache slots."""
  dtype: FloatDtype = "bfloat16"
  """Type of parameters and activations."""
  remat: RematPolicy = "full"
  """What a training step's backward pass recomputes."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def run(self) -> None:
    """Compiles dense and the plan, and prints the table."""
    check_writable(self.json)
    config, own = model_of(self.model)
    config = dataclasses.replace(config, dtype=self.dtype, param_dtype=self.dtype)
    plan = own if self.plan is None else as_plan(self.plan, config.num_layers)
    # A dense model needs no calibration.
    plans = dict.fromkeys((plan,) if self.kind == "calibration" else (as_plan(None, config.num_layers), plan))
    sizes = mesh_on(self.topology, self.mesh)
    batch = sizes.ways if self.batch_size is None else self.batch_size
    jobs = [Job(config, plan, self.kind, self.topology, batch, self.length, sizes, self.remat) for plan in plans]
    fits: list[Fit] = []
    with progress("compiling") as update:
      for job in jobs:
        update(len(fits), len(jobs))
        fits.append(fit(job))
    names = [str(plan) for plan in plans]
    title = f"{self.model}, {self.kind}, {batch} × {self.length} tokens, {self.dtype}, {self.topology} as {sizes}"
    show_table(title, ["per step", *names, *(["change"] if len(fits) == 2 else [])], rows_of_fit(fits))
    for name, result in zip(names, fits, strict=True):
      verdict = "fits" if result.fits else f"does not fit: {result.problem}"
      console.print(f"{name}: {verdict} ({result.devices} × {result.device})")
    values = {"model": self.model, "kind": self.kind, "topology": self.topology, "batch": batch, "length": self.length}
    write_json(
      self.json, values | {"mesh": dataclasses.asdict(sizes), "dtype": self.dtype, "fits": dict(zip(names, fits))}
    )
