"""Writes the data of `sa_jax.plans` from the results of ``recovery.py``.

python experiments/search/zoo.py --model MODEL --name "Gemma 3 270M" --out sa_jax/plans/gemma-3-270m.json \
      --results results/recovery-gemma-3-270m.json results/recovery-gemma-3-270m-10.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sa_jax
from sa_jax import plans

RECOVERIES = {
  "W_O": "head maps and W_O",
  "MLP": "head maps, W_O and MLPs",
  "local": "head maps, W_O, MLPs and local reconstruction",
}


def main() -> None:
  """Takes the refit with the lowest held-out loss for every budget."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--name", required=True)
  parser.add_argument("--results", type=Path, nargs="+", required=True)
  parser.add_argument("--out", type=Path, required=True)
  flags = parser.parse_args()
  model, params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
  entries = {}
  for file in flags.results:
    stored = json.loads(file.read_text(encoding="utf-8"))
    for count, values in stored["results"].items():
      refits = {label: each for label, each in values.items() if isinstance(each, dict) and "shared_attention" in each}
      for label, each in refits.items():
        if count not in entries or each["judged"] < entries[count]["judged"]:
          entries[count] = each | {"recovery": RECOVERIES[label.split(":")[0]], "plan": values["plan"]}
  rows = stored["settings"]["rows"]["fit"]
  values = {
    "model": flags.name,
    "shapes": plans.of_shapes(model.config),
    "final_norm": plans.of_final_norm(params),
    "made": f"experiments/search: greedy on a shortlist of 8, refitted on {rows} rows of 512 tokens each of wikitext-2 "
    f"train and C4 in float32 on one {stored['settings']['device']}; perplexity over the dense model's on 16 rows each",
    "plans": [
      {
        "followers": int(count),
        "plan": entry["plan"],
        "recovery": entry["recovery"],
        "times_dense": {name: round(value, 4) for name, value in entry["times_dense"]["test"].items()},
        "shared_attention": entry["shared_attention"],
      }
      for count, entry in sorted(entries.items(), key=lambda item: int(item[0]))
    ],
  }
  flags.out.write_text(json.dumps(values, separators=(", ", ": ")).replace('{"followers"', '\n{"followers"') + "\n")


if __name__ == "__main__":
  main()
