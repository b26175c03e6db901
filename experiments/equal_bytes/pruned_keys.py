"""The cost of dropping each key head's least used rotary pairs, alone and with narrower values; see README.md here.

A pair of channels that RoPE rotates together is dropped from a key head and its query heads if its mean ``q² k²`` is
lowest (after ThinK, arXiv 2407.21018, which chooses per prompt). It is simulated by zeros in W_Q and W_K, which is
equivalent to keys without those channels. Each layer's W_O and MLP are refitted after the pruned layers before it, as
in `sa_jax.analysis.refit`.

    python experiments/equal_bytes/pruned_keys.py --model MODEL --data "$SA_JAX_DATA" --out FILE
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sa_jax
from sa_jax.analysis import walk
from sa_jax.analysis.refit import Passage, Refit, recover_layer
from sa_jax.analysis.walk import Block, Targets
from sa_jax.config import ModelConfig
from sa_jax.nn import PlanArrays

MIXTURES = ((24, 64), (32, 48), (24, 48), (16, 64), (32, 32), (20, 40), (16, 32))
"""Rotary pairs per key head, out of 32, and size of its values, out of 64."""


def least_used(config: ModelConfig, targets: tuple[Targets, ...], pairs: int) -> jax.Array:
  """Which channels stay, bool ``[K, H]``: for each key head the rotary pairs with the largest mean ``q² k²``."""
  heads, half = config.num_kv_heads, config.head_dim // 2
  energy = jnp.zeros((heads, half))
  for target in targets:
    # Rotation preserves a pair's norm, so pairs can be compared after RoPE.
    q, k = (jnp.square(x.astype(jnp.float32)).mean((0, 1)) for x in (target.state.q, target.state.k))
    q = q.reshape(heads, -1, 2 * half).sum(1)
    energy += (q[:, :half] + q[:, half:]) * (k[:, :half] + k[:, half:])
  order = jnp.argsort(jnp.argsort(-energy, axis=-1), axis=-1)
  return jnp.tile(order < pairs, (1, 2))


def without(config: ModelConfig, block: Block, kept: jax.Array) -> Block:
  """A layer with zeros for the dropped channels."""
  attention = dict(block["attention"])
  for name, count in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
    mask = jnp.repeat(kept, count // len(kept), axis=0)
    attention[name] = jax.tree.map(lambda leaf, mask=mask: leaf * mask.astype(leaf.dtype), attention[name])
  return dict(block) | {"attention": attention}


def pruned(config: ModelConfig, params: Any, rows: np.ndarray, mixture: tuple[int, int], chunk: int) -> Any:
  """The dense model with fewer rotary pairs and narrower values, refitted layer by layer."""
  pairs, rank = mixture
  how = Refit(mlp=True, value_dim=rank)
  student = dense = walk.start(config, params, rows, chunk)
  layers = {}
  for layer in range(config.num_layers):
    block, arrays = params["layers"][str(layer)], PlanArrays.of_layer(layer, config, is_anchor=True)
    targets = tuple(walk.dense_layer(config, block, part, arrays) for part in dense)
    dense = tuple(walk.Chunk(target.x, target.state) for target in targets)
    block = without(config, block, least_used(config, targets, pairs))
    layers[str(layer)], student, _ = recover_layer(config, block, arrays, Passage(student, targets, len(student)), how)
  return dict(params) | {"layers": layers}


def main() -> None:
  """Measures every mixture, and prints and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", type=Path, required=True, help="a model without norms of queries and keys")
  add("--data", type=Path, required=True, help="folder with corpora/ and eval/llm_foundry/")
  add("--out", type=Path, required=True, help="a JSON file")
  add("--rows", type=int, default=176, help="rows of each text to fit to")
  add("--test", type=int, default=16)
  add("--length", type=int, default=512)
  add("--chunk", type=int, default=32)
  add("--mixtures", type=int, nargs="+", help="pairs and numbers of values, in turns")
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  sys.path.insert(0, str(Path(__file__).parents[1] / "search"))
  from run import calibration_texts, test_texts

  model, params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
  params = jax.tree.map(jnp.asarray, params)
  config, tokenizer = walk.walking(model, params), sa_jax.load_tokenizer(flags.model)
  encode = lambda text, rows: tokenizer.encode(text[: 8 * flags.length * rows], special=False)
  split = lambda text, rows: sa_jax.rows_of(encode(text, rows), flags.length, rows, tokenizer.opening())
  fit = np.concatenate([split(text, flags.rows) for text in calibration_texts(flags.data).values()])
  tests = {name: split(text, flags.test) for name, text in test_texts(flags.data).items()}
  score = lambda params: {
    name: sa_jax.perplexity(model, sa_jax.stack(params, model.plan), rows, batch_size=flags.chunk).loss
    for name, rows in tests.items()
  }
  dense, found = score(params), []
  asked = iter(flags.mixtures or ())
  half = config.head_dim // 2
  for pairs, rank in [*zip(asked, asked, strict=True)] or MIXTURES:
    begun = time.perf_counter()
    losses = score(pruned(config, params, fit, (pairs, rank), flags.chunk))
    times = {name: math.exp(loss - dense[name]) for name, loss in losses.items()}
    part = (2 * pairs + rank) / (2 * config.head_dim)
    found.append({"pairs": pairs, "values": rank, "part": part, "times_dense": times})
    shown = " / ".join(f"{each:.3f}" for each in times.values())
    print(
      f"{pairs} of {half} pairs, values of {rank}: {part:.1%}  {shown}  {time.perf_counter() - begun:.0f} s", flush=True
    )
    settings = {"device": jax.devices()[0].device_kind, "rows": flags.rows, "test": flags.test, "length": flags.length}
    flags.out.write_text(json.dumps({"settings": settings, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
