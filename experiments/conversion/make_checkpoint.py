"""Makes a synthetic Llama checkpoint of 1.1 billion random bfloat16 parameters in shards (TinyLlama's shapes)."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import sa_jax
from sa_jax.formats.table import entries


def make(folder: Path, shards: int = 5, layers: int = 22, experts: int = 0) -> sa_jax.ModelConfig:
  """Writes ``config.json``, the shards and their index; the weights are the same every time."""
  config = sa_jax.ModelConfig(
    vocab_size=32_000, embed_dim=2048, num_layers=layers, num_heads=32, num_kv_heads=4, head_dim=64, mlp_dim=5632,
    bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16", param_dtype="bfloat16",
  )  # fmt: skip
  if experts:
    config = dataclasses.replace(config, family="mixtral", experts=sa_jax.ops.Experts(experts, 2))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2))
  shapes = {entry.key: entry.shape for entry in entries(config)}
  limit = sum(2 * int(np.prod(shape)) for shape in shapes.values()) / shards
  rng = np.random.default_rng(0)
  weight_map: dict[str, str] = {}
  shard: dict[str, np.ndarray] = {}
  number = 1

  def flush() -> None:
    nonlocal number
    name = f"model-{number:05d}-of-{shards:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, name))
    shard.clear()
    number += 1

  for key, shape in shapes.items():
    shard[key] = (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    if sum(array.nbytes for array in shard.values()) > limit and number < shards:
      flush()
  flush()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return config


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path)
  parser.add_argument("--layers", type=int, default=22)
  parser.add_argument("--experts", type=int, default=0, help="in the place of each MLP, as in Mixtral")
  arguments = parser.parse_args()
  make(arguments.folder, layers=arguments.layers, experts=arguments.experts)
