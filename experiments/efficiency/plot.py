"""Plots decode time and cache size against context length from the output of `sa-jax bench decode --json`.

    python plot.py gpu/h200/decode-llama-3-8b-b16.json --out gpu/h200/decode-context.png

`sa-jax bench decode --length 4096 8192 --plot …` measures and plots in one run; this combines runs of the same batch
and GPU.
"""

import argparse
import json
from pathlib import Path

from sa_jax.bench.plot import decode_curves
from sa_jax.bench.task import Result, task_of


def main() -> None:
  """Reads results and plots them."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("files", nargs="+", type=Path)
  parser.add_argument("--out", type=Path, required=True)
  arguments = parser.parse_args()
  results = [
    Result(**values | {"task": task_of(values["task"])})
    for file in arguments.files
    for values in json.loads(file.read_text(encoding="utf-8"))
  ]
  if len({(result.task.model, result.task.batch_size, result.device) for result in results}) > 1:
    raise SystemExit("the results are of several models, batches or cards; give those of one")
  decode_curves(sorted(results, key=lambda result: result.task.length), arguments.out)


if __name__ == "__main__":
  main()
