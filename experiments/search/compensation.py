"""A linear compensation for followers compared with a refit of W_O; see README.md in this folder.

    python experiments/search/compensation.py --model MODEL --data "$SA_JAX_DATA" --out FILE

UniAttn (arXiv 2502.00439) adds a linear map of a follower's input to its attention output. Here it is fitted together
with W_O in one ridge regression: inputs are the head outputs and the block's normed input, the target is the dense
layer's attention output. The map has ``D²`` weights per follower; W_Q and W_K, which it lacks, have ``D (N + K) H``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from run import calibration_texts, test_texts

import sa_jax
from sa_jax.analysis import walk
from sa_jax.analysis.ridge import Sums, product, solve, total
from sa_jax.analysis.walk import Chunk
from sa_jax.config import ModelConfig
from sa_jax.nn import PlanArrays, PlannedBlock
from sa_jax.programs import program

RIDGE = 0.01


@program(static_argnames=("config", "linear"))
def features(config: ModelConfig, block: walk.Block, chunk: Chunk, layer: PlanArrays, linear: bool) -> jax.Array:
  """The regression's inputs, ``[B, T, N H]``, or with the normed input appended ``[B, T, N H + D]``."""
  heads = walk.call(config, block, PlannedBlock.heads, chunk.x, chunk.state, layer.head_map)
  flat = heads.reshape(*heads.shape[:2], -1)
  normed = walk.call(config, block, lambda self, x: self.attention_norm(x), chunk.x)
  # Scaled to the norm of head outputs, so that one ridge suits both.
  scale = jnp.sqrt(jnp.mean(jnp.square(flat)) / jnp.mean(jnp.square(normed)))
  return jnp.concatenate([flat, normed * scale], axis=-1) if linear else flat


@program(static_argnames="config")
def rest(config: ModelConfig, block: walk.Block, x: jax.Array, read: jax.Array, kernel: jax.Array) -> jax.Array:
  """The block's output if its attention output is ``read kernel``."""
  middle = walk.call(config, block, PlannedBlock.add_attention, x, product("BTX,XD->BTD", read, kernel))
  return walk.call(config, block, PlannedBlock.add_mlp, middle)


def losses(
  config: ModelConfig, params: Any, plan: sa_jax.SharingPlan, rows: list[np.ndarray], linear: bool | None
) -> list[float]:
  """Mean loss of each text except the first, which followers are fitted on; no fit if linear is None."""
  streams = [walk.start(config, params, each, 8) for each in rows]
  dense = streams
  for layer in range(config.num_layers):
    block = params["layers"][str(layer)]
    as_dense = PlanArrays.of_layer(layer, config, is_anchor=True)
    targets = [tuple(walk.dense_layer(config, block, chunk, as_dense) for chunk in stream) for stream in dense]
    dense = [tuple(Chunk(target.x, target.state) for target in each) for each in targets]
    if plan.is_anchor(layer) or linear is None:
      arrays = PlanArrays.of_layer(layer, config, plan.is_anchor(layer))
      streams = [tuple(walk.advance(config, block, chunk, arrays) for chunk in stream) for stream in streams]
      continue
    arrays = PlanArrays.of_layer(layer, config, is_anchor=False)
    read = [[features(config, block, chunk, arrays, linear) for chunk in stream] for stream in streams]
    sums = total(Sums.of(x, target.y) for x, target in zip(read[0], targets[0], strict=True))
    prior = block["attention"]["o_proj"]["kernel"].reshape(-1, config.embed_dim)
    prior = jnp.pad(prior, ((0, sums.gram.shape[0] - prior.shape[0]), (0, 0)))
    kernel, _ = solve(sums, prior, RIDGE)
    streams = [
      tuple(Chunk(rest(config, block, chunk.x, x, kernel), chunk.state) for chunk, x in zip(stream, each, strict=True))
      for stream, each in zip(streams, read, strict=True)
    ]
  return [
    float(walk.losses(config, params, stream, each).mean()) for stream, each in zip(streams[1:], rows[1:], strict=True)
  ]


def main() -> None:
  """Reads the flags, measures, and prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", type=Path, required=True)
  add("--data", type=Path, required=True)
  add("--plans", type=Path, default=Path(__file__).parent / "results" / "greedy.json")
  add("--followers", type=int, nargs="+", default=[8, 16])
  add("--rows", type=int, default=24, help="of each text to fit to")
  add("--test", type=int, default=8, help="of each text to test on")
  add("--length", type=int, default=512)
  add("--out", type=Path, required=True)
  flags = parser.parse_args()
  model, params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
  config, tokenizer = walk.walking(model, params), sa_jax.load_tokenizer(flags.model)

  def cut(text: str, rows: int) -> np.ndarray:
    tokens = tokenizer.encode(text[: 8 * flags.length * rows], special=False)
    return sa_jax.rows_of(tokens, flags.length, rows, tokenizer.opening())

  rows = [np.concatenate([cut(text, flags.rows) for text in calibration_texts(flags.data).values()])]
  rows += [cut(text, flags.test) for text in test_texts(flags.data).values()]
  stored = json.loads(flags.plans.read_text(encoding="utf-8"))["results"]
  dense = losses(config, params, sa_jax.SharingPlan.dense(config.num_layers), rows, None)
  results: dict[str, Any] = {"rows": flags.rows, "test": flags.test, "dense": [math.exp(loss) for loss in dense]}
  for followers in flags.followers:
    plan = sa_jax.SharingPlan.parse(stored[str(followers)]["plan"], config.num_layers)
    for name, linear in (("identity", None), ("W_O", False), ("W_O and a linear map", True)):
      begun = time.perf_counter()
      found = losses(config, params, plan, rows, linear)
      times = [math.exp(loss - each) for loss, each in zip(found, dense, strict=True)]
      results.setdefault(str(followers), {"plan": str(plan)})[name] = times
      print(
        f"{followers:2d} {name:<22} {times[0]:.3f} / {times[1]:.3f}   {time.perf_counter() - begun:.0f} s", flush=True
      )
      flags.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
