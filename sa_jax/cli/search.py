"""``sa-jax search``: which layers to share."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

from sa_jax.cli.common import console, exact_float32, is_first, show_table, tell, write_json
from sa_jax.cli.searching import Searching
from sa_jax.display import count
from sa_jax.files import check_folder, check_writable, make_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan(Searching):
  """Search for the best plan within a budget, evaluated by its loss after recovery."""

  refit: bool = True
  """Evaluate plans after refitting."""
  maps: bool = True
  """Evaluate plans with head maps."""
  out: Path = Path("search")
  """Folder for the plot."""
  json: Path | None = None
  """Also write the plan and the Pareto front to this file."""

  @exact_float32()
  def run(self) -> None:
    """Prints the plan and the Pareto front."""
    from sa_jax import cost
    from sa_jax.analysis import Judge, plots, search
    from sa_jax.analysis.budget import Budget
    from sa_jax.analysis.refit import Refit
    from sa_jax.analysis.share import search_plan
    from sa_jax.cli.progress import stages
    from sa_jax.cli.texts import rows_at_once
    from sa_jax.formats.hf_plan import write_plan

    plots.check_installed()
    check_folder(self.out)
    for file in (self.record, self.json):
      check_writable(file)
    budget, how = Budget.parse(self.budget), self.settings.search
    config = self.opening.config(self.model)
    budget = budget.counted(config, self.cutting.length)
    how.check(config, budget)
    model, params, texts = self.prepare()
    texts = [text._replace(calibration=text.calibration[: how.search_rows]) for text in texts]
    with stages() as stage:
      judge = Judge(
        model,
        params,
        texts,
        Refit() if self.refit else None,
        maps=self.maps,
        chunk=rows_at_once(model.config, self.cutting.length),
        record=self.record,
        progress=stage("reading the texts"),
      )
      found = search_plan(judge, budget, how, stage)
    front = search.pareto(judge)
    dense = cost(model.config, None).kv_bytes_per_token
    saved = lambda plan: 1 - cost(model.config, plan).kv_bytes_per_token / dense
    show_table(
      f"Pareto front of {count(len(judge.measured), 'measured plan')}",
      ["plan", "followers", "KV saved", "nats added", *(f"nats, {text.name}" for text in texts)],
      [
        [
          str(each.plan),
          str(len(each.plan.followers)),
          f"{saved(each.plan):.1%}",
          f"{each.increase:.4f}",
          *(f"{loss:.4f}" for loss in each.losses),
        ]
        for each in front
      ],
    )
    tell("best plan (anchor:followers)", found.plan)
    write_json(
      self.json,
      {
        "plan": str(found.plan),
        "shared_attention": write_plan(judge.with_maps(found.plan)),
        "dense_losses": dict(zip((text.name for text in texts), judge.dense.tolist(), strict=True)),
        "front": [
          {"plan": str(each.plan), "kv_saved": saved(each.plan), "losses": each.losses.tolist()} for each in front
        ],
      },
    )
    file = self.out / "pareto.png"
    rows = sum(len(text.judging) for text in texts)
    names = ", ".join(text.name for text in texts)
    title = f"{self.model.stem}: what sharing costs\n{names}, {rows} rows of {self.cutting.length} tokens"
    # Label few plans in full, many by their number of followers.
    label = lambda each: (
      f"{each.plan}\nperplexity × {math.exp(each.increase):.3f}" if len(front) <= 3 else str(len(each.plan.followers))
    )
    name = how.strategy if len(front) <= 3 else f"{how.strategy} (numbers: followers)"
    if is_first():
      make_folder(self.out)
      plots.pareto_front(
        {name: [(saved(each.plan), each.increase) for each in front]},
        file,
        title=title,
        labels={name: [label(each) for each in front]},
      )
    tell("plot of the front", file)
    paths = " ".join(shlex.quote(str(path)) for path in (self.model, *self.texts))
    console.print(f"save a model with it: sa-jax share {paths} --plan {found.plan} --out FOLDER", soft_wrap=True)
