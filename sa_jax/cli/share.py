"""``sa-jax share``: from a dense model and a budget to a shared model, in one command."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sa_jax.cli.common import change, console, show_table, write_json
from sa_jax.cli.cost import rows_of_cost


@dataclasses.dataclass(frozen=True)
class Share:
  """Search a plan, align heads, refit, compare with the dense model, save: everything without training."""

  model: tyro.conf.Positional[Path]
  """A dense Hugging Face folder, GGUF file or sa_jax checkpoint."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT ...")]
  """Text files (or .jsonl with a "text" a line) to calibrate on and judge by; each counts alike."""
  out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
  """The checkpoint to write, which must not exist."""
  budget: str = "8"
  """A number of followers, or what may remain of the dense cost: kv=80%, flops=95%."""
  strategy: Literal["dp", "greedy", "beam", "spans"] = "dp"
  """dp is the cheapest; greedy and beam measure every candidate, or a shortlist; spans is the paper's recipe."""
  width: int = 4
  """beam: plans kept at each step."""
  shortlist: int | None = None
  """greedy, beam: candidates measured at each step; None measures all."""
  swaps: int = 0
  """dp: swaps to measure after it."""
  exclude: tuple[int, ...] = ()
  """Layers that stay anchors."""
  length: int = 512
  """Tokens a row."""
  calibration_rows: int = 8
  """Rows of each text to fit to."""
  judging_rows: int = 4
  """Further rows of each text to measure on."""
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
  """Type of the stored parameters."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def run(self) -> None:
    """Prints dense against shared, and saves."""
    from sa_jax import cost
    from sa_jax.analysis import search
    from sa_jax.analysis.share import Search, share
    from sa_jax.cli.texts import open_dense, save, split_texts, stages
    from sa_jax.convert.hf_config import write_plan

    begun = time.perf_counter()
    if self.out.exists():
      raise ValueError(f"{self.out} exists already; name a new folder, or remove it first")
    how = Search(
      strategy=self.strategy, width=self.width, shortlist=self.shortlist, swaps=self.swaps, excluded=self.exclude
    )
    texts = split_texts(self.model, self.texts, self.length, self.calibration_rows, self.judging_rows)
    model, params = open_dense(self.model)
    followers = search.followers_for(model.config, self.budget, self.length)
    with stages() as stage:
      made = share(model, params, texts, followers, how=how, stage=stage)
    plan = made.model.plan
    costs = [cost(model.config, each, 1, self.length) for each in (None, plan)]
    table = rows_of_cost(*costs)
    for text in texts:
      dense, shared = made.dense[text.name].perplexity, made.shared[text.name].perplexity
      table.append([f"perplexity, {text.name}", f"{dense:.3f}", f"{shared:.3f}", change(shared, dense)])
    show_table(f"{followers} followers; {self.length} tokens", ["", "dense", "shared", "change"], table)
    save(self.out, self.model, made.model, made.params, self.dtype)
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
