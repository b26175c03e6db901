"""Similarity maps of SmolLM2-135M, and their drift over our training checkpoints; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import sa_jax
from sa_jax.analysis import drift, layer_similarity, plots


def main() -> None:
  """Writes the maps (PNG), the numbers (JSON) and, for several checkpoints, the drift (GIF)."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoints in order; SmolLM2 if not given")
  parser.add_argument("--data", type=Path, required=True, help="folder with corpora/")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--rows", type=int, default=4)
  arguments = parser.parse_args()
  if not arguments.model:
    from sa_jax.cli.demo import packaged_model

    arguments.model = [packaged_model()]
  arguments.out.mkdir(parents=True, exist_ok=True)
  text = (arguments.data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
  found = {}
  for path in arguments.model:
    model, params = sa_jax.from_pretrained(path, dtype="float32", layout="layers")
    tokenizer = sa_jax.load_tokenizer(path)
    tokens = tokenizer.encode(text[: 8 * arguments.length * arguments.rows], special=False)
    rows = sa_jax.rows_of(tokens, arguments.length, arguments.rows, tokenizer.opening())
    found[path.stem] = layer_similarity(model, params, rows)
  name, similarity = list(found.items())[-1]
  mean = similarity.mean()
  title = f"{name}\nwikitext2_valid.txt, {arguments.rows} rows of {arguments.length} tokens"
  for field, scale in (
    ("cosine", plots.Scale("cosine similarity")),
    ("cosine_without_sink", plots.Scale("cosine similarity without the first key")),
    ("js_divergence", plots.Scale("Jensen-Shannon divergence, nats", float(np.log(2)), distance=True)),
    ("top_k_overlap", plots.Scale("overlap of the 8 heaviest keys")),
  ):
    values = getattr(mean, field)
    plots.similarity_map(values, arguments.out / f"{field}.png", title=title, scale=scale)
    beside = [round(float(values[layer - 1, layer]), 3) for layer in range(1, len(values))]
    print(f"{scale.label}, each layer and the one before: mean {np.mean(beside):.3f}, {beside}")
  means = {each: result.mean() for each, result in found.items()}
  numbers = {each: {key: value.tolist() for key, value in result._asdict().items()} for each, result in means.items()}
  (arguments.out / "similarity.json").write_text(
    json.dumps({"rows": arguments.rows, "length": arguments.length, "models": numbers}) + "\n", encoding="utf-8"
  )
  if len(found) > 1:
    plots.similarity_animation({each: result.cosine for each, result in means.items()}, arguments.out / "drift.gif")
    table = dict(zip(found, drift(list(found.values())).tolist(), strict=True))
    (arguments.out / "drift.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print("distance to the last checkpoint:", table)


if __name__ == "__main__":
  main()
