"""Makes ``RESULTS.md`` from the JSON files in this folder, one table per machine.

python experiments/efficiency/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "RESULTS.md"
GB = 1e9
KINDS = {
  "decode": "decode",
  "prefill": "prefill",
  "train": "gradient of the layers",
  "step": "train step",
  "batching": "requests",
}


CEILINGS = ("decode", "prefill")
"""Kinds for which the fraction of the ceiling is shown."""


def read() -> dict[str, list[dict]]:
  """Every measurement of `sa-jax bench`, with its file, by device."""
  machines: dict[str, list[dict]] = {}
  for path in sorted([*HERE.glob("gpu/**/*.json"), *HERE.glob("several/*.json")]):
    values = json.loads(path.read_text(encoding="utf-8"))
    for result in values if isinstance(values, list) else []:
      machines.setdefault(result["device"], []).append(result | {"file": str(path.relative_to(HERE))})
  return machines


def conditions(task: dict) -> tuple[str, ...]:
  """Conditions that distinguish measurements, besides the plan and the program."""
  tokens = f"{task['filled']} of {task['length']}" if task.get("filled") else str(task["length"])
  split = [f"`{axis}` {size}" for axis, size in task["mesh"].items() if size > 1]
  more = [task["cache_dtype"] + " cache"] if task.get("cache_dtype") else []
  if task["kind"] in ("step", "train"):
    more.append(f"remat {task.get('remat', 'full')}")
  layers = f", {task['layers']} layers" if task.get("layers") else ""
  return (f"{task['model']}{layers}", f"{task['batch_size']} × {tokens}", ", ".join(split + more))


def what(task: dict) -> str:
  """The program and its plan."""
  if task["who"] != "sa_jax":
    return {"hf-compiled": "transformers, compiled", "hf-eager": "transformers, eager"}.get(task["who"], task["who"])
  weights = ", attention weights" if task["attention_state"] == "attention_weights" else ""
  return f"`{task['plan']}`{weights}" + (", one backward pass a group" if task.get("group_backward") else "")


def bench_rows(results: list[dict]) -> Iterator[list[str]]:
  """The rows of a machine's table, in the order of its files."""
  dense = {(r["file"], conditions(r["task"])): r for r in reversed(results) if what(r["task"]) == "`dense`"}
  for result in results:
    task, seconds = result["task"], result["seconds"]
    base = dense.get((result["file"], conditions(task)))
    share = result["work"] / seconds / result["ceiling"] if result["ceiling"] and task["kind"] in CEILINGS else None
    yield [
      KINDS[task["kind"]],
      *conditions(task),
      what(task),
      f"{1e3 * seconds:.2f} ({1e3 * result['low']:.2f}–{1e3 * result['high']:.2f})",
      "" if base is None or base is result else f"{base['seconds'] / seconds:.3f} ×",
      "" if share is None else f"{share:.1%}",
      "" if not result["temp_bytes"] else f"{result['temp_bytes'] / GB:.2f}",
      result["detail"].replace("|", "/"),
    ]


def generation_rows(values: dict) -> Iterator[list[str]]:
  """Rows of ``smollm2.json``."""
  for row in values["rows"]:
    yield [str(row["batch"]), row["who"].replace("plan ", ""), f"{row['tokens_per_second']:,.0f}"]


def draft_rows(values: dict) -> Iterator[list[str]]:
  """Rows of ``speculative*.json``."""
  greedy = values["greedy"]["tokens_per_second"]
  yield ["none: plain greedy", "1.00", f"{greedy:,.0f}", "1.00"]
  for name, row in values["drafts"].items():
    speed = row["tokens_per_second"]
    yield [name, f"{row['tokens_per_round']:.2f}", f"{speed:,.0f}", f"{speed / greedy:.2f}"]


def serving_rows(values: dict) -> Iterator[list[str]]:
  """Rows of ``serving*.json``."""
  for row in values["rows"]:
    how, between = row["how"], row.get("between", {})
    name = "static batches"
    if how is not None:
      pages = "" if how["cache_slots"] is None else f" in pages of {how['cache_slots']:,} slots"
      more = [f"{key} {how[key]}" for key in ("together", "read") if how[key] not in (None, 1)]
      more += ["longest first"] if how["longest_first"] else []
      more += [f"a look every {how['chunk']}"] if row["watched"] else []
      name = ", ".join([f"{how['slots']} rows{pages}", *more])
    yield [
      f"{row['load']}, {row['requests']}",
      name,
      f"{row['seconds']:.2f} ({row['low']:.2f}–{row['high']:.2f})",
      f"{row['tokens_per_second']:,.0f}",
      f"{row['against_static']:.2f} ×",
      *(f"{1e3 * between[key]:.1f}" if between else "" for key in ("p50", "p99", "longest")),
    ]


def fit_rows() -> Iterator[list[str]]:
  """Rows of the programs compiled for TPUs."""
  for path in sorted(HERE.glob("tpu/*.json")):
    values = json.loads(path.read_text(encoding="utf-8"))
    split = " × ".join(f"{axis} {size}" for axis, size in values["mesh"].items() if size > 1)
    for plan, fit in values["fits"].items():
      sent = ", ".join(f"{each['kind']} {each['count']} / {each['bytes'] / GB:.2f}" for each in fit["collectives"])
      yield [
        path.stem,
        f"{values['topology']}, {split}",
        f"{values['kind']}, {values['model']}, {values['batch']} × {values['length']}",
        f"`{plan}`",
        f"{fit['peak_bytes'] / GB:.3f}",
        f"{fit['hbm_bytes'] / GB:.1f}",
        f"{1e3 * max(fit['compute_seconds'], fit['memory_seconds']):.1f}",
        sent,
      ]


def table(columns: list[str], rows: Iterator[list[str]]) -> str:
  """A table in Markdown."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results() -> str:
  """The whole page."""
  parts = [
    "# Results of `experiments/efficiency`",
    "Made by `python experiments/efficiency/tables.py` from the JSON files beside it; the README has the commands. "
    "Times are medians, with the fastest and the slowest: of one token for decode, of the whole for requests. "
    "*Against dense* is dense's time over the row's, in the same run. *Of ceiling* is the part of the copy bandwidth "
    "(decode) or of the rate of a large matrix product (prefill) that was measured in the same process. GB are "
    "temporaries of the program on one device.",
  ]
  columns = ["what", "model", "rows × tokens", "setting", "plan", "ms", "against dense", "of ceiling", "GB", "more"]
  for machine, found in read().items():
    parts += [f"## {machine}", table(columns, bench_rows(found))]
  for path in sorted(HERE.glob("gpu/**/smollm2.json")):
    values = json.loads(path.read_text(encoding="utf-8"))
    parts += [f"## SmolLM2-135M, real weights, {values['device']}", f"`{path.relative_to(HERE)}`"]
    parts.append(table(["rows", "plan", "tokens/s"], generation_rows(values)))
  for path in sorted(HERE.glob("gpu/**/speculative*.json")):
    values = json.loads(path.read_text(encoding="utf-8"))
    title = f"## Speculative decoding of SmolLM2-135M, one row, {values['ahead']} proposals a round, {values['device']}"
    parts += [title, f"`{path.relative_to(HERE)}`"]
    parts.append(table(["draft", "tokens a round", "tokens/s", "of greedy's"], draft_rows(values)))
  for path in sorted(HERE.glob("gpu/**/serving*.json")):
    values = json.loads(path.read_text(encoding="utf-8"))
    parts += [f"## Serving, {values['model']}, {values['layers']} layers, {values['device']}"]
    parts += [f"`{path.relative_to(HERE)}`; times between two tokens of a request are in milliseconds"]
    columns = ["requests", "served", "seconds", "tokens/s", "of static batches", "p50", "p99", "longest"]
    parts.append(table(columns, serving_rows(values)))
  columns = ["file", "slice", "program", "plan", "peak, GB", "memory, GB", "roofline, ms", "collectives: times / GB"]
  parts += ["## TPU, compiled ahead of time; nothing ran", table(columns, fit_rows())]
  return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
  OUT.write_text(results(), encoding="utf-8")
