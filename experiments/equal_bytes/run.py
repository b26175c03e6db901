"""The cost of caches of equal size by different methods; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from board import Board, Json, add_flags

import sa_jax
from sa_jax.analysis.budget import Budget, Means
from sa_jax.analysis.mixture import Mixture, increases, within
from sa_jax.analysis.search import no_stage

BUDGETS = (0.875, 0.75, 0.54, 0.5, 0.33, 0.27, 0.25, 0.2)
TICKS = (1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5)
METHODS: dict[str, tuple[Means, ...]] = {
  "sharing": ("sharing",),
  "values": ("values",),
  "int8": ("int8",),
  "int4": ("int4",),
  "mixture, not quantised": ("sharing", "values"),
  "mixture": ("sharing", "values", "int8", "int4"),
}


def run(board: Board, budgets: list[float], refitted: int) -> None:
  """One row per method and budget: the best that fits, by held-out rows."""
  plans, judge = board.plans(), board.judge()
  board.say("judging")
  for budget in budgets:
    fitting: dict[str, list[Mixture]] = {}
    for name, allow in METHODS.items():
      try:
        fitting[name] = within(board.model.config, Budget("kv", budget, allow), plans)
      except sa_jax.UserError as error:
        board.say(f"{name}: {error}")
    order = increases(
      judge, list(dict.fromkeys(each for options in fitting.values() for each in options)), no_stage("")
    )
    board.say(f"{budget:g}: " + "; ".join(f"{mixture} {cost:.3f}" for mixture, cost in order.items()))
    rows: dict[str, Json] = {}
    for name, options in fitting.items():
      tried = [mixture for mixture in order if mixture in options][:refitted]
      # Single methods are among the refitted ones, so a mixture's held-out loss is never higher than theirs.
      alone = [rows[other] for other in rows if set(METHODS[other]) < set(METHODS[name])]
      rows[name] = min([*map(board.measure, tried), *alone], key=lambda made: made["judged"])
    others = [row for row in board.stored["rows"] if row["budget"] != budget]
    board.stored["rows"] = others + [{"budget": budget, "method": name} | row for name, row in rows.items()]
    board.stored["rows"].sort(key=lambda row: -row["budget"])
    board.save()


def plot(file: Path) -> None:
  """Plots loss against bytes, next to the file of results."""
  import matplotlib.pyplot as plt

  stored = json.loads(file.read_text(encoding="utf-8"))
  texts = list(stored["settings"]["dense"]["test"])
  figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), sharey=True, layout="constrained")
  methods = [name for name in METHODS if any(row["method"] == name for row in stored["rows"])]
  for axis, text in zip(np.atleast_1d(axes), texts, strict=True):
    for name in methods:
      mine = sorted((row for row in stored["rows"] if row["method"] == name), key=lambda row: row["part"])
      axis.plot(
        [100 * row["part"] for row in mine],
        [row["times_dense"]["test"][text] for row in mine],
        marker="o",
        markersize=12 if len({row["mixture"] for row in mine}) == 1 else 6,
        color=f"C{list(METHODS).index(name)}",
        label=name,
      )
    axis.set(title=text, xlabel="cache, % of bfloat16's", yscale="log")
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in TICKS if low < tick < high], minor=False)
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
  np.atleast_1d(axes)[0].set_ylabel("perplexity, × dense")
  figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
  figure.savefig(file.with_suffix(".png"), dpi=150)


def main() -> None:
  """Reads the flags."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add_flags(parser)
  parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="others, that the file has, are kept")
  parser.add_argument("--refitted", type=int, default=1, help="candidates of each method that are refitted on all rows")
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  run(Board(flags), flags.budgets, flags.refitted)
  plot(flags.out)


if __name__ == "__main__":
  main()
