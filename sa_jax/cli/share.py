"""``sa-jax share``: from a dense model and a budget to a shared model, in one command."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax.analysis.budget import Means
from sa_jax.analysis.share import EFFORTS
from sa_jax.cli.common import change, console, exact_float32, is_first, show_table, tell, write_json
from sa_jax.cli.cost import rows_of_cost
from sa_jax.cli.opening import check_range
from sa_jax.cli.searching import Searching
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError
from sa_jax.files import check_absent, check_writable

if TYPE_CHECKING:
  from sa_jax import Transformer
  from sa_jax.analysis import Text
  from sa_jax.analysis.share import Shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share(Searching):
  """Search for a plan, align heads, refit, optionally distil, compare with the dense model, and save."""

  out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
  """The checkpoint to write, which must not exist."""
  dtype: FloatDtype = "bfloat16"
  """Type of the stored parameters."""
  allow: tuple[Means, ...] = ("sharing",)
  """For a budget such as kv=75%: methods that may shrink the cache."""
  plan: str | None = None
  """Use this plan instead of a search: 5:6-7,14:15, or zoo:8 for the known plan with 8 followers, if sa_jax.plans has
  one. On a CPU, --effort good uses a known plan by default, unless there are search flags or --plan search."""
  distill_minutes: float | None = None
  """Minutes of distillation after the refit, on all rows except the held-out ones."""
  plot: Path | None = None
  """Plot perplexities against the dense model's to this PNG."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def prefers_known_plan(self) -> bool:
    """Whether to use a known plan: on a CPU, where a search takes an hour, if no search flag is given."""
    import jax

    explicit = self.plan is not None or self.record is not None or self.settings.search != EFFORTS["good"].search
    return self.effort == "good" and not explicit and jax.default_backend() == "cpu"

  @exact_float32()
  def run(self) -> None:
    """Prints dense and shared, and saves."""
    from sa_jax import SharingPlan, plans
    from sa_jax.analysis import plots
    from sa_jax.analysis.budget import Budget
    from sa_jax.analysis.distilling import Distillation
    from sa_jax.analysis.forecast import with_estimates, work
    from sa_jax.analysis.share import share
    from sa_jax.cli.progress import stages
    from sa_jax.cli.texts import rows_at_once
    from sa_jax.formats.hf_plan import check_can_narrow

    start = time.perf_counter()
    check_absent(self.out)
    if self.plot is not None:
      plots.check_installed()
    for file in (self.json, self.record, self.plot):
      check_writable(file)
    asked = None if self.plan == "search" else self.plan
    sought = {"budget": self.budget != type(self).budget, "allow": self.allow != type(self).allow}
    if asked is not None and (given := [f"`{name}`" for name, is_given in sought.items() if is_given]):
      raise UserError(f"`plan` fixes what is shared, and {' and '.join(given)} what to search: give only one of them")
    wanted: Budget | SharingPlan
    wanted = budget = dataclasses.replace(Budget.parse(self.budget), allow=self.allow)
    distillation = None if self.distill_minutes is None else Distillation(minutes=self.distill_minutes)
    config, length = self.opening.config(self.model), self.cutting.length
    known = None if asked is None or not asked.startswith("zoo:") else asked.removeprefix("zoo:")
    if asked is not None and known is None:
      wanted = SharingPlan.parse(asked, config.num_layers)
    elif asked is None:
      wanted = budget.counted(config, length) if self.allow == ("sharing",) else budget
      self.settings.search.check(config, wanted)
      if "values" in self.allow:
        check_can_narrow(config)
    model, params, texts = self.prepare(all_rows=distillation is not None)
    check_range(params, self.dtype)
    if known is not None:
      wanted = plans.get(model, Budget.parse(known).most(config), params).plan
    elif isinstance(wanted, Budget) and wanted.measure == "followers" and self.prefers_known_plan():
      with contextlib.suppress(UserError):
        wanted = plans.get(model, int(wanted.amount), params).plan
        tell("plan", f"{wanted}, known for this model; --plan search searches for one on these texts")
    if self.settings.mlp and config.experts is not None:
      tell("MLPs", "not refitted, because they are experts")
    with stages() as stage:
      chunk = rows_at_once(model.config, length)
      if isinstance(wanted, SharingPlan) or wanted.measure == "followers":
        count = wanted if isinstance(wanted, SharingPlan) else int(wanted.amount)
        stage = with_estimates(work(config, texts, count, self.settings, chunk), stage, lambda text: tell("time", text))
      made = share(
        model, params, texts, wanted, self.settings,
        chunk=chunk, distillation=distillation, record=self.record, stage=stage,
      )  # fmt: skip
    self._finish(made, model, texts, start)

  def _finish(self, made: Shared, model: Transformer, texts: Sequence[Text], start: float) -> None:
    """Prints and writes the result of a command that began at ``start``, in seconds of `time.perf_counter`."""
    from sa_jax import cost
    from sa_jax.analysis import plots
    from sa_jax.analysis.card import card, results
    from sa_jax.formats.hf_plan import write_plan

    plan, length = made.plan, self.cutting.length
    dense = dataclasses.replace(model.config, dtype=self.dtype, param_dtype=self.dtype)
    table = rows_of_cost(cost(dense, None, 1, length), cost(made.mixture.config(dense), plan, 1, length))
    perplexities = results(made)
    for name, numbers in perplexities.items():
      old, new = numbers["dense"], numbers["shared"]
      table.append([f"perplexity, {name}", f"{old:.3f}", f"{new:.3f}", change(new, old)])
    show_table(f"{made.mixture}; {length} tokens", ["", "dense", "shared", "change"], table)
    seconds = time.perf_counter() - start
    # The folder is written last, with its card: until it exists, an interrupted command can be run again.
    if self.plot is not None and is_first():
      rows = sum(len(text.judging) for text in texts)
      title = f"{self.model.stem} with {made.mixture}\n{rows} rows of {length} tokens"
      plots.perplexity_bars(perplexities, self.plot, title=title)
    write_json(
      self.json,
      {
        "plan": str(plan),
        "shared_attention": write_plan(plan, made.model.config),
        "cache_dtype": made.mixture.cache_dtype,
        "seconds": seconds,
        "perplexity": perplexities,
        "refit": [each._asdict() for each in made.reports],
      },
    )
    written = card(self.model.name, model.config, made, texts, self.settings, seconds)
    self.opening.save(self.out, self.model, made.model, made.params, self.dtype, written)
    tell("plan (anchor:followers)", plan)
    tell(f"saved in {time.perf_counter() - start:.0f} s", self.out)
    cache = "" if made.mixture.cache_dtype is None else f" --cache-dtype {made.mixture.cache_dtype}"
    if cache:
      console.print(f"the checkpoint does not store the cache dtype, {made.mixture.cache_dtype}")
    console.print(f'try it: sa-jax generate {shlex.quote(str(self.out))} "Once upon a time"{cache}', soft_wrap=True)
