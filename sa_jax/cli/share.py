"""``sa-jax share``: from a dense model and a budget to a shared model, in one command."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import change, console, exact_float32, show_table, write_json
from sa_jax.cli.cost import rows_of_cost
from sa_jax.cli.searching import Searching
from sa_jax.config import FloatDtype
from sa_jax.files import check_absent, check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share(Searching):
  """Search a plan, align heads, refit, compare with the dense model, save: everything without training."""

  out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
  """The checkpoint to write, which must not exist."""
  dtype: FloatDtype = "bfloat16"
  """Type of the stored parameters."""
  json: Path | None = None
  """Also write the numbers to this file."""

  @exact_float32()
  def run(self) -> None:
    """Prints dense against shared, and saves."""
    from sa_jax import cost
    from sa_jax.analysis.share import share
    from sa_jax.cli.texts import rows_at_once, stages
    from sa_jax.formats.hf_config import write_plan

    begun = time.perf_counter()
    check_absent(self.out)
    check_writable(self.json)
    model, params, texts, followers = self.prepare()
    effort, chunk = self.settings, rows_at_once(model.config, self.cutting.length)
    recovery = effort.recovery(model.config)
    with stages() as stage:
      made = share(model, params, texts, followers, how=effort.search, recovery=recovery, chunk=chunk, stage=stage)
    plan = made.model.plan
    costs = [cost(model.config, each, 1, self.cutting.length) for each in (None, plan)]
    table = rows_of_cost(*costs)
    for text in texts:
      dense, shared = made.dense[text.name].perplexity, made.shared[text.name].perplexity
      table.append([f"perplexity, {text.name}", f"{dense:.3f}", f"{shared:.3f}", change(shared, dense)])
    show_table(f"{followers} followers; {self.cutting.length} tokens", ["", "dense", "shared", "change"], table)
    self.opening.save(self.out, self.model, made.model, made.params, self.dtype)
    seconds = time.perf_counter() - begun
    console.print(f"\n[bold]{plan}[/bold]\n\nsaved in {seconds:.0f} s: [bold]{self.out}[/bold]")
    write_json(
      self.json,
      {
        "plan": str(plan),
        "shared_attention": write_plan(plan),
        "seconds": seconds,
        "perplexity": {
          text.name: {"dense": made.dense[text.name].perplexity, "shared": made.shared[text.name].perplexity}
          for text in texts
        },
        "refit": [each._asdict() for each in made.reports],
      },
    )
