"""Published compensations for followers compared with a refit of W_O; see README.md in this folder.

    python experiments/search/compensation.py --model MODEL --data "$SA_JAX_DATA" --out FILE

UniAttn (arXiv 2502.00439) adds a linear map of a follower's input to its attention output. Here it is fitted together
with W_O in one ridge regression: inputs are the head outputs and the block's normed input, the target is the dense
layer's attention output. The map has ``D²`` weights per follower; W_Q and W_K, which it lacks, have ``D (N + K) H``.

LiSA (arXiv 2408.01890) adds a product of narrow queries and keys to a follower's scores. Here their weights, ``D (N +
K) R`` for rank ``R``, are trained to match the dense layer's attention output, and W_O is then fitted. A follower
caches ``K R`` numbers per token for them, of the ``K H`` that sharing saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from run import calibration_texts, test_texts

import sa_jax
from sa_jax.analysis import walk
from sa_jax.analysis.reconstruct import relative, warmed_cosine
from sa_jax.analysis.refit import Refit, refit
from sa_jax.analysis.ridge import Sums, product, solve, total
from sa_jax.analysis.walk import Chunk
from sa_jax.config import ModelConfig
from sa_jax.nn import PlanArrays, PlannedBlock
from sa_jax.nn.state import State
from sa_jax.programs import program

RIDGE = 0.01
PASSES, RATE = 32, 3e-3
"""Training of low-rank scores: passes over the fitting rows, and Adam's peak learning rate."""
ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)


class Compensation(NamedTuple):
  """What a follower has besides its anchor's weights.

  Attributes:
    fitted: whether W_O is fitted to the dense layer's attention output.
    linear: whether a linear map of its input is added to its output.
    rank: of the scores that are added to its anchor's.
  """

  fitted: bool = True
  linear: bool = False
  rank: int = 0


Scores = tuple[jax.Array, jax.Array]
"""Weights of narrow queries ``[D, N, R]`` and keys ``[D, K, R]``."""


def corrected(config: ModelConfig, block: walk.Block, chunk: Chunk, scores: Scores) -> State:
  """The carried state, with the product of narrow queries and keys added to its scores."""
  normed = walk.call(config, block, lambda self, x: self.attention_norm(x), chunk.x)
  more = [jnp.einsum("BTD,DNR->BTNR", normed, weights) for weights in scores]
  # Scores are products of queries and keys, so more channels add more products.
  q, k = (jnp.concatenate(each, axis=-1) for each in zip((chunk.state.q, chunk.state.k), more, strict=True))
  (spec,) = chunk.state.specs
  spec = dataclasses.replace(spec, scale=spec.scale_for(config.head_dim))
  return dataclasses.replace(chunk.state, q=q, k=k, specs=(spec,), backend="reference")


@program(static_argnames=("config", "linear"))
def features(
  config: ModelConfig, block: walk.Block, chunk: Chunk, layer: PlanArrays, linear: bool, scores: Scores | None
) -> jax.Array:
  """The regression's inputs, ``[B, T, N H]``, or with the normed input appended ``[B, T, N H + D]``."""
  state = chunk.state if scores is None else corrected(config, block, chunk, scores)
  heads = walk.call(config, block, PlannedBlock.heads, chunk.x, state, layer.head_map)
  flat = heads.reshape(*heads.shape[:2], -1)
  if not linear:
    return flat
  normed = walk.call(config, block, lambda self, x: self.attention_norm(x), chunk.x)
  # Scaled to the norm of head outputs, so that one ridge suits both.
  scale = jnp.sqrt(jnp.mean(jnp.square(flat)) / jnp.mean(jnp.square(normed)))
  return jnp.concatenate([flat, normed * scale], axis=-1)


@program(static_argnames="config")
def step(
  config: ModelConfig,
  block: walk.Block,
  layer: PlanArrays,
  part: tuple[Chunk, jax.Array],
  trained: tuple[Scores, Any],
  rate: jax.Array,
) -> tuple[Scores, Any]:
  """One step of Adam on the distance of a follower's attention output, with the dense W_O, from the dense layer's."""
  (chunk, target), (scores, moments) = part, trained

  def distance(scores: Scores) -> jax.Array:
    state = corrected(config, block, chunk, scores)
    heads = walk.call(config, block, PlannedBlock.heads, chunk.x, state, layer.head_map)
    return relative(walk.call(config, block, PlannedBlock.attention_output, heads), target)

  updates, moments = ADAM.update(jax.grad(distance)(scores), moments)
  return jax.tree.map(lambda old, update: old - rate * update, scores, updates), moments


def low_rank(
  config: ModelConfig, block: walk.Block, stream: walk.Stream, layer: PlanArrays, targets: list[jax.Array], rank: int
) -> Scores:
  """The trained weights of a follower's own scores, which begin at zero."""
  generator = np.random.default_rng(0)
  shape = lambda heads: (config.embed_dim, heads, rank)
  queries = np.zeros(shape(config.num_heads), np.float32)
  keys = generator.normal(0, config.embed_dim**-0.5, shape(config.num_kv_heads)).astype(np.float32)
  scores: Scores = (jnp.asarray(queries), jnp.asarray(keys))
  moments, steps = ADAM.init(scores), PASSES * len(stream)
  order = np.concatenate([generator.permutation(len(stream)) for _ in range(PASSES)])
  for number, index in enumerate(order):
    rate = np.float32(RATE * warmed_cosine(number, steps, warmup=0.1))
    scores, moments = step(config, block, layer, (stream[index], targets[index]), (scores, moments), rate)
  return scores


@program(static_argnames="config")
def rest(config: ModelConfig, block: walk.Block, x: jax.Array, read: jax.Array, kernel: jax.Array) -> jax.Array:
  """The block's output if its attention output is ``read kernel``."""
  middle = walk.call(config, block, PlannedBlock.add_attention, x, product("BTX,XD->BTD", read, kernel))
  return walk.call(config, block, PlannedBlock.add_mlp, middle)


def losses(
  config: ModelConfig, params: Any, plan: sa_jax.SharingPlan, rows: list[np.ndarray], how: Compensation
) -> list[float]:
  """Mean loss of each text except the first, which followers are fitted on."""
  streams = [walk.start(config, params, each, 8) for each in rows]
  dense = streams
  for layer in range(config.num_layers):
    block = params["layers"][str(layer)]
    as_dense = PlanArrays.of_layer(layer, config, is_anchor=True)
    targets = [tuple(walk.dense_layer(config, block, chunk, as_dense) for chunk in stream) for stream in dense]
    dense = [tuple(Chunk(target.x, target.state) for target in each) for each in targets]
    if plan.is_anchor(layer) or not how.fitted:
      arrays = PlanArrays.of_layer(layer, config, plan.is_anchor(layer))
      streams = [tuple(walk.advance(config, block, chunk, arrays) for chunk in stream) for stream in streams]
      continue
    arrays = PlanArrays.of_layer(layer, config, is_anchor=False)
    scores = None
    if how.rank:
      scores = low_rank(config, block, streams[0], arrays, [target.y for target in targets[0]], how.rank)
    read = [[features(config, block, chunk, arrays, how.linear, scores) for chunk in stream] for stream in streams]
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


def reconstructed(
  model: sa_jax.Transformer, params: Any, plan: sa_jax.SharingPlan, rows: list[np.ndarray], epochs: int
) -> list[float]:
  """`losses` after W_O is fitted and groups are trained to match the dense model's blocks."""
  made = refit(model, params, plan, rows[0], Refit(mlp=False, local_epochs=epochs), chunk=8, on_device=True)
  config, whole = walk.walking(model, params), walk.whole(made.params, params)
  walked = [walk.through(config, whole, made.plan, walk.start(config, params, each, 8)) for each in rows[1:]]
  return [
    float(walk.losses(config, params, stream, each).mean()) for stream, each in zip(walked, rows[1:], strict=True)
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
  add("--ranks", type=int, nargs="*", default=[4, 8], help="of low-rank scores")
  add("--local-epochs", type=int, default=8, help="passes of local reconstruction, for comparison; 0: none")
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
  dense = losses(config, params, sa_jax.SharingPlan.dense(config.num_layers), rows, Compensation(fitted=False))
  results: dict[str, Any] = json.loads(flags.out.read_text(encoding="utf-8")) if flags.out.exists() else {}
  results |= {"rows": flags.rows, "test": flags.test, "dense": [math.exp(loss) for loss in dense]}
  for followers in flags.followers:
    plan = sa_jax.SharingPlan.parse(stored[str(followers)]["plan"], config.num_layers)
    methods = {
      "identity": Compensation(fitted=False),
      "W_O": Compensation(),
      "W_O and a linear map": Compensation(linear=True),
      **{f"W_O and scores of rank {rank}": Compensation(rank=rank) for rank in flags.ranks},
    }
    measured = results.setdefault(str(followers), {"plan": str(plan)})
    calls = {name: functools.partial(losses, config, params, plan, rows, how) for name, how in methods.items()}
    if flags.local_epochs:
      calls["local reconstruction"] = functools.partial(reconstructed, model, params, plan, rows, flags.local_epochs)
    for name, call in calls.items():
      begun = time.perf_counter()
      found = call()
      times = [math.exp(loss - each) for loss, each in zip(found, dense, strict=True)]
      measured[name] = times
      print(
        f"{followers:2d} {name:<24} {times[0]:.3f} / {times[1]:.3f}   {time.perf_counter() - begun:.0f} s", flush=True
      )
      flags.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
