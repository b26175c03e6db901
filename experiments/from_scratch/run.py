"""A 12-layer byte-level model from scratch, dense and with groups of 2 and of 4, on the same tokens in the same order.

Writes results.json (the loss at each evaluation, and the gap to dense at the end), curves.png, and one folder per run
under --out. With --experts 8 it is a mixture of experts, and the loads of the most and least loaded experts are also
recorded. Run again with the same flags to resume. A test run on a CPU:

  python experiments/from_scratch/run.py --steps 4 --batch-size 2 --length 64 --embed 64 --dtype float32 --out /tmp/s
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from sa_jax import ModelConfig, SharingPlan, cost
from sa_jax.cli.common import console, show_table
from sa_jax.ops import Experts
from sa_jax.train.config import DataConfig, LogConfig, TrainConfig
from sa_jax.train.loop import train
from sa_jax.train.optimizer import OptimizerConfig

LAYERS = 12
MAX = "expert_load_max"
TRAIN = ("wikitext2_train_5k.txt", "llamafactory_wiki_demo.txt", "llamafactory_c4_demo.jsonl", "tinyshakespeare.txt")


def main() -> None:
  """Trains all models, and compares them."""
  flags = parse()
  runs = {name: run(flags, name, size) for size in flags.groups for name in [_name(size)]}
  dense = runs["dense"]["eval_loss"]
  results = {name: each | {"gap": each["eval_loss"] - dense} for name, each in runs.items()}
  (flags.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  draw(results, flags.out / "curves.png")
  show_table(
    f"wikitext-2 valid after {flags.steps} steps of {flags.batch_size} × {flags.length} bytes",
    ["", "parameters", "KV bytes per token", "nats per byte", "bits per byte", "gap to dense"],
    [
      [name, f"{each['parameters']:,}", str(each["kv_bytes_per_token"]), f"{each['eval_loss']:.4f}",
       f"{each['eval_loss'] / 0.6931471805599453:.4f}", f"{each['gap']:+.4f}"]
      for name, each in results.items()
    ],
  )  # fmt: skip


def parse() -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  data = os.environ.get("SA_JAX_DATA")
  add = parser.add_argument
  add("--data", type=Path, default=data, required=data is None, help="folder of data (SA_JAX_DATA)")
  add("--out", type=Path, default=Path("results/from_scratch"))
  add("--steps", type=int, default=1500)
  add("--batch-size", type=int, default=64, help="rows per step")
  add("--length", type=int, default=512, help="bytes a row")
  add("--embed", type=int, default=384, help="width; heads have 64 (32 if it is below 256)")
  add(
    "--groups", type=int, nargs="+", default=[1, 2, 4], help="layers that share, of each model; 1 is dense, the first"
  )
  add("--experts", type=int, default=0, help="experts in the place of each MLP, of which a token goes through two")
  add("--learning-rate", type=float, default=1e-3)
  add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of computation; parameters are float32")
  add("--seed", type=int, default=0)
  flags = parser.parse_args()
  if flags.groups[0] != 1:
    parser.error("--groups begins with 1, the dense model that the others are compared with")
  return flags


def _name(size: int) -> str:
  return "dense" if size == 1 else f"groups of {size}"


def architecture(flags: argparse.Namespace) -> ModelConfig:
  """The dense model. Two experts together are as wide as the MLP that they replace."""
  heads = flags.embed // (64 if flags.embed >= 256 else 32)
  shape = ModelConfig(
    vocab_size=264, embed_dim=flags.embed, num_layers=LAYERS, num_heads=heads, num_kv_heads=heads,
    head_dim=flags.embed // heads, mlp_dim=8 * flags.embed // 3 // 32 * 32, max_length=flags.length,
    tie_embeddings=True, eos_token_ids=(256,),
  )  # fmt: skip
  if not flags.experts:
    return shape
  experts = Experts(flags.experts, chosen=2)
  return dataclasses.replace(shape, family="mixtral", experts=experts, mlp_dim=shape.mlp_dim // 2)


def run(flags: argparse.Namespace, name: str, size: int) -> dict[str, Any]:
  """Trains with groups of one size."""
  shape = architecture(flags)
  plan = SharingPlan(tuple(layer // size * size for layer in range(LAYERS)))
  corpora = flags.data / "corpora"
  config = TrainConfig(
    out=flags.out / name.replace(" ", "-"),
    shape=shape,
    plan=str(plan),
    mode="pretrain",
    batch_size=flags.batch_size,
    steps=flags.steps,
    dtype=flags.dtype,
    seed=flags.seed,
    data=DataConfig(
      train=tuple(corpora / file for file in TRAIN),
      eval=(corpora / "wikitext2_valid.txt",),
      length=flags.length,
      packing="none",  # documents are long; without segments attention runs on cuDNN
    ),
    optimizer=OptimizerConfig(learning_rate=flags.learning_rate, warmup_steps=max(flags.steps // 20, 1)),
    log=LogConfig(
      log_every=max(flags.steps // 100, 1),
      eval_every=max(flags.steps // 15, 1),
      eval_batches=max(1, 256 * 1024 // (flags.batch_size * flags.length)) if flags.steps > 10 else 2,
      save_every=max(flags.steps // 3, 1),
      keep=1,
      export_every=max(flags.steps // 6, 1),
      tensorboard=False,
    ),
  )
  console.rule(name)
  outcome = train(config, say=console.print, console=console)
  if outcome.model is None:
    raise SystemExit("interrupted; the same command goes on")
  lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
  counted = cost(shape, plan, 1, flags.length)
  return {
    "plan": str(plan),
    "parameters": counted.params,
    "kv_bytes_per_token": counted.kv_bytes_per_token,
    "eval_loss": outcome.eval_loss,
    "eval": [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line],
    "train": [[line["step"], line["loss"]] for line in lines if "loss" in line],
    "load": [[line["step"], line["expert_load_max"], line["expert_load_min"]] for line in lines if MAX in line],
  }


def draw(results: dict[str, Any], path: Path) -> None:
  """Plots both losses by step, and for a mixture the loads of experts."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  of_experts = bool(results["dense"]["load"])
  figure, axes = pyplot.subplots(1, 2 + of_experts, figsize=(11 + 5 * of_experts, 4))
  for axis, kind in zip(axes, ("train", "eval")):
    for name, each in results.items():
      axis.plot(*zip(*each[kind], strict=True), label=f"{name} ({each['eval_loss']:.3f})" if kind == "eval" else name)
    title = "training text" if kind == "train" else "wikitext-2 valid"
    axis.set(title=title, xlabel="step", ylabel="nats per byte")
    axis.legend()
  if of_experts:
    for number, (name, each) in enumerate(results.items()):
      steps, most, least = zip(*each["load"], strict=True)
      axes[2].plot(steps, most, color=f"C{number}", label=name)
      axes[2].plot(steps, least, color=f"C{number}", linestyle="--")
    axes[2].set(
      title="fullest (solid) and emptiest (dashed) expert of any layer",
      xlabel="step",
      ylabel="tokens, times an equal share",
    )
    axes[2].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


if __name__ == "__main__":
  main()
