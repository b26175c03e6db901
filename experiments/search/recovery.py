"""Compares recoveries on plans from earlier searches; see README.md in this folder.

    python experiments/search/recovery.py rows --model MODEL --data "$SA_JAX_DATA" --rows rows.npz
    python experiments/search/recovery.py measure --model MODEL --rows rows.npz --plans plans.json \
      --jobs "8 W_O MLP local:4:2e-4 distill:60:2e-4:all" "16 MLP" --out FILE

A job is a number of followers and its recoveries. A recovery is one of ``W_O``; ``MLP`` (W_O and MLPs);
``local:EPOCHS:RATE`` (both, then local reconstruction); ``distill:SECONDS:RATE:TEXT``, from the previous refit with the
lowest held-out loss, on ``calibration`` rows or on ``all`` text, or with ``all+novels`` or ``all+written`` on more.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sa_jax
from sa_jax.analysis import Judge, Text, search
from sa_jax.analysis.distilling import Distillation, distill_rows
from sa_jax.analysis.refit import Refit, refit
from sa_jax.formats.hf_plan import write_plan

LENGTH = 512


def further_text(data: Path) -> list[str]:
  """Text only for distillation: an encyclopaedia, stories, and the passages in T0's prompts, each once.

  The passages are film plots, reviews, news and the like: closer to the stories of a test text than the other texts.
  """
  names = ("llamafactory_wiki_demo.txt", "tinystories_excerpt_197k.txt")
  passages: dict[str, str] = {}
  with tarfile.open(data / "instruct" / "t0_p3_50k_instructions.tar.xz") as archive:
    for member in archive:
      stream = archive.extractfile(member)
      for line in stream.read().decode("utf-8").splitlines() if stream else ():
        row = json.loads(line)
        longest = max(f"{row['prompt']}\n{row['completion']}".split("\n"), key=len).replace("<|endoftext|>", "")
        if len(longest) > 400:
          passages.setdefault(longest[-300:-100], longest)
  return [
    *((data / "corpora" / name).read_text(encoding="utf-8") for name in names),
    "\n\n".join(passages.values()),
  ]


def make_rows(flags: argparse.Namespace) -> None:
  """Writes the rows for `measure`: calibration, held-out, test and further rows of each text."""
  from run import calibration_texts, test_texts

  tokenizer = sa_jax.load_tokenizer(flags.model)
  cut = lambda text, rows=None: sa_jax.rows_of(tokenizer.encode(text, special=False), LENGTH, rows, tokenizer.opening())
  out, further = {}, []
  for name, text in calibration_texts(flags.data).items():
    rows = cut(text)
    fit, judging = flags.fit, flags.judging
    out[f"fit/{name}"], out[f"judge/{name}"] = rows[:fit], rows[fit : fit + judging]
    further.append(rows[fit + judging :])
  for name, text in test_texts(flags.data).items():
    out[f"test/{name}"] = cut(text[: 8 * LENGTH * flags.test], flags.test)
  further += [cut(text) for text in further_text(flags.data)]
  out["further/all"] = np.concatenate(further)
  if flags.novels:
    out["further/novels"] = cut(flags.novels.read_text(encoding="utf-8"))
  print({name: rows.shape for name, rows in out.items()})
  np.savez_compressed(flags.rows, **{name.replace("/", "|"): rows for name, rows in out.items()})


class Study:
  """The model, the rows, and the measurements."""

  def __init__(self, flags: argparse.Namespace):
    self.flags, self.begun = flags, time.perf_counter()
    with np.load(flags.rows) as stored:
      rows = {name.replace("|", "/"): stored[name] for name in stored.files}
    of = lambda kind: {name.split("/")[1]: each for name, each in rows.items() if name.startswith(kind + "/")}
    self.fit, self.judge, self.test, self.further = of("fit"), of("judge"), of("test"), of("further")
    if flags.written:
      with np.load(flags.written) as stored:
        self.further["written"] = stored["written"]
    if flags.limit:
      cut = lambda texts: {name: each[: flags.limit] for name, each in texts.items()}
      self.fit, self.judge, self.test = cut(self.fit), cut(self.judge), cut(self.test)
      self.further = cut(self.further)
    self.model, self.params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
    self.params = jax.tree.map(jax.numpy.asarray, self.params)
    self.dense = self.perplexities(self.model, self.params)
    self.results: dict[str, Any] = {}
    if flags.out.exists():
      self.results = json.loads(flags.out.read_text())["results"]
    self.say(f"dense {self.dense}")

  def say(self, text: str) -> None:
    """Prints a line with the time."""
    print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", flush=True)

  def perplexities(self, model: sa_jax.Transformer, params: Any) -> dict[str, dict[str, float]]:
    """Perplexities on held-out and test rows, by text."""
    stacked = sa_jax.stack(params, model.plan)
    of = lambda rows: sa_jax.perplexity(model, stacked, rows, batch_size=self.flags.chunk).perplexity
    return {
      kind: {name: of(rows) for name, rows in texts.items()}
      for kind, texts in (("judge", self.judge), ("test", self.test))
    }

  def search(self, followers: int) -> dict[int, sa_jax.SharingPlan]:
    """Greedy search with a shortlist: the best plan for each number of followers."""
    texts = [Text(name, self.fit[name][:16], self.judge[name]) for name in self.fit]
    judge = Judge(self.model, self.params, texts, Refit(), chunk=self.flags.chunk)
    shortlist = search.Shortlist(self.flags.shortlist, judge.costs(reach=5))
    best = search.beam(judge, followers, shortlist=shortlist)
    self.say(f"searched: {[str(found.plan) for found in best]}")
    return {len(found.plan.followers): found.plan for found in best}

  def run(self, budget: int, plan: sa_jax.SharingPlan, recoveries: list[str]) -> None:
    """Measures every recovery of one plan."""
    refits: list[tuple[float, Any]] = []
    done = self.results.setdefault(str(budget), {"plan": str(plan)})
    fitting = np.concatenate(list(self.fit.values()))
    for label in recoveries:
      begun = time.perf_counter()
      kind, *numbers = label.split(":")
      steps = None
      if kind == "distill":
        seconds, rate, text = numbers
        rows = np.concatenate([fitting, *(self.further[name] for name in text.split("+") if name != "calibration")])
        made = min(refits, key=lambda each: each[0])[1]
        how = Distillation(
          minutes=float(seconds) / 60, learning_rate=float(rate), batch_size=self.flags.batch_size,
          steps=self.flags.steps,
        )  # fmt: skip
        result = distill_rows((made.model, made.params), (self.model, self.params), rows, how)
        model, params, steps = made.model, result.params, result.steps
        extra = {"steps": steps, "losses": [float(np.mean(part)) for part in np.array_split(result.losses, 10)]}
      else:
        epochs, rate = (int(numbers[0]), float(numbers[1])) if kind == "local" else (0, 1.0)
        ridge = self.flags.mlp_ridge
        how = Refit(maps=True, mlp=kind != "W_O", mlp_ridge=ridge, local_epochs=epochs, local_rate=rate)
        made = refit(self.model, self.params, plan, fitting, how, chunk=self.flags.chunk, on_device=True)
        model, params = made.model, made.params
        extra = {"shared_attention": write_plan(made.plan)}
      seconds_taken = time.perf_counter() - begun
      found = self.perplexities(model, params)
      times = {
        kind: {name: value / self.dense[kind][name] for name, value in texts.items()} for kind, texts in found.items()
      }
      judged = float(np.mean([math.log(each) for each in times["judge"].values()]))
      if kind != "distill":
        refits.append((judged, made))
      done[label] = {"perplexity": found, "times_dense": times, "judged": judged, "seconds": seconds_taken} | extra
      show = "; ".join(
        f"{kind} {' / '.join(f'{each:.3f}' for each in texts.values())}" for kind, texts in times.items()
      )
      self.say(f"{budget:2d} {label:<28} {show}   {seconds_taken:.1f} s {steps or ''}")
      self.save()

  def save(self) -> None:
    """Writes the measurements."""
    settings = {
      "device": jax.devices()[0].device_kind,
      "rows": {
        "fit": self.flags.limit or len(next(iter(self.fit.values()))),
        "further": {name: len(rows) for name, rows in self.further.items()},
      },
      "length": LENGTH,
      "batch_size": self.flags.batch_size,
      "mlp_ridge": self.flags.mlp_ridge,
      "dense": self.dense,
    }
    self.flags.out.write_text(json.dumps({"settings": settings, "results": self.results}, indent=1) + "\n")


def main() -> None:
  """Reads the flags."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("stage", choices=("rows", "measure"))
  add("--model", type=Path, required=True)
  add("--rows", type=Path, required=True, help="the .npz file of rows")
  add("--novels", type=Path, help="rows: the text that `novels.py` made")
  add("--written", type=Path, help="measure: the .npz file of `written.py`")
  add("--data", type=Path, help="rows: folder with corpora/, instruct/ and eval/llm_foundry/")
  add("--fit", type=int, default=176, help="rows of each text to fit to")
  add("--judging", type=int, default=16)
  add("--test", type=int, default=16)
  add("--plans", type=Path, help="results of a search, whose plans are taken; greedy on a shortlist if not given")
  add("--shortlist", type=int, default=8)
  add("--jobs", nargs="+", default=["8 W_O MLP"])
  add("--out", type=Path)
  add("--chunk", type=int, default=32)
  add("--batch-size", type=int, default=32)
  add("--mlp-ridge", type=float, default=0.3)
  add("--steps", type=int, help="of distillation, instead of a time")
  add("--limit", type=int, default=0, help="rows of each text, for a try")
  flags = parser.parse_args()
  if flags.stage == "rows":
    make_rows(flags)
    return
  jax.config.update("jax_default_matmul_precision", "highest")
  study = Study(flags)
  jobs = [(int(budget), recoveries) for budget, *recoveries in map(str.split, flags.jobs)]
  if flags.plans is None:
    plans = study.search(max(budget for budget, _ in jobs))
  else:
    stored = json.loads(flags.plans.read_text())["results"]
    layers = study.model.config.num_layers
    plans = {int(count): sa_jax.SharingPlan.parse(each["plan"], layers) for count, each in stored.items()}
  for budget, recoveries in jobs:
    study.run(budget, plans[budget], recoveries)


if __name__ == "__main__":
  main()
