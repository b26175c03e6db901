"""Training on streamed Parquet, compared with the same texts from a token cache: tokens per second.

    python experiments/pods/reading.py --model SmolLM2.gguf --text TEXT ... --steps 60

Texts are cut into documents and written as Parquet. A model of MODEL's shape is trained on it twice, from scratch:
with `DataConfig(dataset=FOLDER)`, which reads, tokenises and packs during training, and with
`DataConfig(train=(FILE,))` and a token cache filled in advance. Batches are also read without any training, which is
the maximum rate of each method. It fails if training on Parquet is slower than 80 % of the cached rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

from sa_jax import SharingPlan, Transformer
from sa_jax.formats.load import describe
from sa_jax.train import DataConfig, LogConfig, TrainConfig, train
from sa_jax.train.data import Reading
from sa_jax.train.reading import tokenizer_of, training_data

_LEAST = 0.8
_DOCUMENT = 4000  # characters


def main() -> None:
  """Measures both ways, prints the table, and fails if Parquet is too slow."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", type=Path, required=True, help="whose tokenizer and shape are used")
  parser.add_argument("--text", type=Path, nargs="+", required=True)
  parser.add_argument("--copies", type=int, default=4, help="how often the texts are written")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--layers", type=int, help="fewer than the model has, for a try on a CPU")
  parser.add_argument("--json", type=Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / "parquet"
    write_parquet(folder, flags.text, flags.copies)
    cached = DataConfig(train=(folder / "train.parquet",), reading=Reading(cache=Path(scratch) / "cache"))
    ways = {"cached tokens": cached, "parquet": DataConfig(dataset=str(folder))}
    configs = {way: config_of(flags, data, Path(scratch) / f"run {way}") for way, data in ways.items()}
    found = {
      way: {"reading": read(config, flags.steps), "training": trained(config)} for way, config in configs.items()
    }
  ratio = found["parquet"]["training"] / found["cached tokens"]["training"]
  print(f"{'tokens/s':<16} {'reading alone':>14} {'training':>12}")
  for way, rates in found.items():
    print(f"{way:<16} {rates['reading']:14,.0f} {rates['training']:12,.0f}")
  print(f"training on Parquet runs at {ratio:.0%} of the cached rate")
  if flags.json:
    flags.json.write_text(json.dumps(found | {"ratio": ratio}, indent=2) + "\n")
  if ratio < _LEAST:
    sys.exit(f"less than {_LEAST:.0%}")


def write_parquet(folder: Path, paths: list[Path], copies: int) -> None:
  """Documents of a few thousand characters, one per row."""
  text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
  documents = [text[start : start + _DOCUMENT] for start in range(0, len(text), _DOCUMENT)] * copies
  folder.mkdir()
  pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "train.parquet", row_group_size=256)


def config_of(flags: argparse.Namespace, data: DataConfig, out: Path) -> TrainConfig:
  """A run from scratch in the model's shape."""
  shape = describe(flags.model, "dense", "bfloat16").config
  if flags.layers:
    shape = dataclasses.replace(shape, num_layers=flags.layers)
  return TrainConfig(
    out=out,
    shape=shape,
    tokenizer=str(flags.model),
    mode="pretrain",
    batch_size=flags.batch_size,
    steps=flags.steps,
    data=dataclasses.replace(data, length=flags.length),
    log=LogConfig(log_every=10, save_every=1_000_000, tensorboard=False),
  )


def read(config: TrainConfig, batches: int) -> float:
  """Tokens per second of reading batches without training, after the first."""
  assert config.shape is not None
  model = Transformer(config.shape, SharingPlan.dense(config.shape.num_layers))
  data = training_data(config, model, tokenizer_of(config), range(config.batch_size), None, lambda _: None)
  iterator = data.batches()
  next(iterator)
  began = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  return batches * config.batch_size * config.data.length / (time.perf_counter() - began)


def trained(config: TrainConfig) -> float:
  """Tokens per second of a training run, over the windows after the first."""
  train(config)
  lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
  rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]
  return len(rates) / sum(1 / rate for rate in rates)


if __name__ == "__main__":
  main()
