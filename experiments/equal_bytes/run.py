"""What a cache of equal bytes costs by one means and by another; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sa_jax
from sa_jax.analysis import Judge, Text
from sa_jax.analysis.budget import Budget, Means
from sa_jax.analysis.mixture import Mixture, judged, within
from sa_jax.analysis.refit import Refit, refit
from sa_jax.analysis.search import no_stage
from sa_jax.cli.texts import rows_at_once
from sa_jax.formats.hf_plan import write_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))
from run import calibration_texts, test_texts

BUDGETS = (0.875, 0.75, 0.54, 0.5, 0.33, 0.27, 0.25, 0.2)
METHODS: dict[str, tuple[Means, ...]] = {
  "sharing": ("sharing",),
  "values": ("values",),
  "int8": ("int8",),
  "int4": ("int4",),
  "mixture, no int8": ("sharing", "values"),
  "mixture": ("sharing", "values", "int8", "int4"),
}
Json = dict[str, Any]


class Board:
  """The model, the texts, and what has been measured.

  Args:
    flags: of the command line.
  """

  def __init__(self, flags: argparse.Namespace):
    self.flags, self.begun = flags, time.perf_counter()
    self.model, self.params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
    tokenizer = sa_jax.load_tokenizer(flags.model)
    encode = lambda text, rows: tokenizer.encode(text[: 8 * flags.length * rows], special=False)
    split = lambda text, rows: sa_jax.rows_of(encode(text, rows), flags.length, rows, tokenizer.opening())
    rows, judging = flags.rows + flags.judging, flags.judging
    self.texts = [
      Text(name, *np.split(split(text, rows), [rows - judging])) for name, text in calibration_texts(flags.data).items()
    ]
    self.tests = {name: split(text, flags.test) for name, text in test_texts(flags.data).items()}
    self.chunk = min(flags.chunk, rows_at_once(self.model.config, flags.length))
    self.dense = self.perplexities(self.model, self.params)
    self.made: dict[Mixture, Json] = {}
    self.refitted: dict[Mixture, tuple[sa_jax.Transformer, Any]] = {}
    self.say(f"dense {self.dense}")

  def say(self, text: str) -> None:
    """Prints a line, with the time."""
    print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", flush=True)

  def perplexities(self, model: sa_jax.Transformer, params: Any) -> dict[str, dict[str, float]]:
    """Of judging and test rows, by text, read through the cache that the model has."""
    judging = {text.name: text.judging for text in self.texts}
    weights = sa_jax.stack(params, model.plan) if model.config.cache_dtype is None else params
    of = lambda rows: sa_jax.perplexity(model, weights, rows, batch_size=self.chunk).perplexity
    return {
      kind: {name: of(rows) for name, rows in texts.items()}
      for kind, texts in (("judging", judging), ("test", self.tests))
    }

  def measure(self, mixture: Mixture) -> Json:
    """A mixture refitted on all rows, times the dense model's perplexity; and a quantised cache is read."""
    if mixture not in self.made:
      begun = time.perf_counter()
      rows = np.concatenate([text.calibration for text in self.texts])
      how = Refit(maps=True, mlp=True, value_dim=mixture.value_dim, local_epochs=self.flags.local_epochs)
      key = mixture._replace(cache_dtype=None)
      if key not in self.refitted:
        if key == Mixture(self.model.plan):
          self.refitted[key] = (self.model, self.params)
        else:
          made = refit(self.model, self.params, mixture.plan, rows, how, chunk=self.chunk, on_device=True)
          self.refitted[key] = (made.model, made.params)
      model, params = self.refitted[key]
      found = self.perplexities(model.clone(config=mixture.config(model.config)), params)
      times = {
        kind: {name: value / self.dense[kind][name] for name, value in each.items()} for kind, each in found.items()
      }
      self.made[mixture] = {
        "mixture": str(mixture),
        "part": mixture.part(self.model.config),
        "shared_attention": write_plan(model.plan, model.config),
        "cache_dtype": mixture.cache_dtype,
        "times_dense": times,
        "judged": float(np.mean([math.log(each) for each in times["judging"].values()])),
        "seconds": time.perf_counter() - begun,
      }
      show = "  ".join(f"{kind} {' / '.join(f'{each:.3f}' for each in of.values())}" for kind, of in times.items())
      self.say(f"{mixture!s:<40} {100 * mixture.part(self.model.config):5.1f} %  {show}")
    return self.made[mixture]

  def run(self, plans: list[sa_jax.SharingPlan]) -> list[Json]:
    """One row a method and budget: the best that fits, by judging rows."""
    few = [text._replace(calibration=text.calibration[: self.flags.search_rows]) for text in self.texts]
    judge = Judge(self.model, self.params, few, Refit(), chunk=self.chunk)
    stored = json.loads(self.flags.out.read_text(encoding="utf-8"))["rows"] if self.flags.out.exists() else []
    rows = [row for row in stored if row["budget"] not in self.flags.budgets]
    for budget in self.flags.budgets:
      fitting: dict[str, list[Mixture]] = {}
      for name, allow in METHODS.items():
        try:
          fitting[name] = within(self.model.config, Budget("kv", budget, allow), plans)
        except sa_jax.UserError as error:
          self.say(f"{name}: {error}")
      everything = dict.fromkeys(mixture for each in fitting.values() for mixture in each)
      order = judged(judge, list(everything), no_stage(""))
      # What a means alone gives is among what is refitted, so that a mixture is never judged worse.
      best: dict[str, Json] = {}
      for name, options in fitting.items():
        tried = [mixture for mixture in order if mixture in options][: self.flags.refitted]
        alone = [best[other] for other in best if set(METHODS[other]) < set(METHODS[name])]
        best[name] = min([*map(self.measure, tried), *alone], key=lambda made: made["judged"])
        rows.append({"budget": budget, "method": name} | best[name])
        self.save(rows)
    return rows

  def save(self, rows: list[Json]) -> None:
    """Writes what has been measured."""
    settings = {
      "model": self.flags.model.name,
      "device": jax.devices()[0].device_kind,
      "rows": {"fit": self.flags.rows, "judging": self.flags.judging, "test": self.flags.test},
      "length": self.flags.length,
      "local_epochs": self.flags.local_epochs,
      "dense": self.dense,
    }
    self.flags.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def plot(file: Path) -> None:
  """The picture of a file of results: loss against bytes, beside it."""
  import matplotlib.pyplot as plt

  stored = json.loads(file.read_text(encoding="utf-8"))
  texts = list(stored["settings"]["dense"]["test"])
  figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), sharey=True)
  for axis, text in zip(np.atleast_1d(axes), texts, strict=True):
    for name in METHODS:
      mine = sorted((row for row in stored["rows"] if row["method"] == name), key=lambda row: row["part"])
      axis.plot(
        [100 * row["part"] for row in mine],
        [row["times_dense"]["test"][text] for row in mine],
        marker="o",
        markersize=12 if len({row["mixture"] for row in mine}) == 1 else 6,
        label=name,
      )
    axis.set(title=text, xlabel="cache, % of bfloat16's", yscale="log")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
      which(lambda value, _: f"{value:g}")
    axis.invert_xaxis()
    axis.grid(alpha=0.3, which="both")
  np.atleast_1d(axes)[0].set_ylabel("perplexity, × dense")
  np.atleast_1d(axes)[0].legend()
  figure.tight_layout()
  figure.savefig(file.with_suffix(".png"), dpi=150)


def main() -> None:
  """Reads the flags."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", type=Path, required=True)
  add("--data", type=Path, required=True, help="folder with corpora/ and eval/llm_foundry/")
  add("--plans", type=Path, required=True, help="results of a search, whose plans are taken")
  add("--out", type=Path, required=True, help="a JSON file; the picture lies beside it")
  add("--budgets", type=float, nargs="+", default=BUDGETS, help="others, that the file has already, are kept")
  add("--rows", type=int, default=176, help="rows of each text to fit to")
  add("--judging", type=int, default=16)
  add("--test", type=int, default=16)
  add("--search-rows", type=int, default=8, help="of the rows to fit to, how many candidates are judged after")
  add("--refitted", type=int, default=1, help="candidates of each method that are refitted on all rows")
  add("--local-epochs", type=int, default=0, help="passes that train each group after the closed form")
  add("--length", type=int, default=512)
  add("--chunk", type=int, default=32)
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  board = Board(flags)
  stored = json.loads(flags.plans.read_text(encoding="utf-8"))["results"]
  layers = board.model.config.num_layers
  plans = [
    sa_jax.SharingPlan.parse(each["plan"], layers) for _, each in sorted(stored.items(), key=lambda it: int(it[0]))
  ]
  board.run(plans)
  plot(flags.out)


if __name__ == "__main__":
  main()
