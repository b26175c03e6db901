"""Published methods on the board's rows, without training; see README.md in this folder.

* ``eviction``: attention sinks and a window (StreamingLLM, Xiao et al., arXiv 2309.17453, section 3.2): a token attends
  to the first four tokens and to the latest ones, as many as the budget has room for in a row. Positions are the
  tokens' own, since rows are no longer than the model's context.
* ``KVSharer`` (Yang et al., arXiv 2410.18517, section 3): layers that use the keys and values of an earlier layer, with
  their own queries. Pairs are tried from the most distant mean caches on, and kept if the last hidden states stay
  similar to the dense model's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from board import Board, Json, add_flags, show

import sa_jax
from sa_jax import ops
from sa_jax.nn import AnchorAttention

SINKS = 4


class KeysAndValues:
  """Intercepts anchors' methods: collects each layer's keys and values, and replaces them with an earlier layer's.

  Attributes:
    source: int32 ``[L]``, the layer whose keys and values each layer uses.
    keys: ``[B, T, K, H]`` per layer, after RoPE, as cached.
    values: the same.
  """

  def __init__(self, source: jax.Array):
    self.source = source
    self.keys: list[jax.Array] = []
    self.values: list[jax.Array] = []

  def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """A method's result, with replaced keys or values."""
    made = call(*args, **kwargs)
    if not isinstance(context.module, AnchorAttention):
      return made
    match context.method_name:
      case "query_key":
        return made[0], self._replaced(self.keys, made[1])
      case "values":
        return self._replaced(self.values, made)
    return made

  def _replaced(self, kept: list[jax.Array], own: jax.Array) -> jax.Array:
    kept.append(own)
    return jnp.stack(kept)[self.source[len(kept) - 1]]


@functools.partial(jax.jit, static_argnums=0)
def forward(
  model: sa_jax.Transformer, params: Any, tokens: jax.Array, source: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Mean losses ``[B]``, last hidden states ``[B, T, D]``, and mean keys and values of each layer ``[L, 2, K, H]``."""
  kept = KeysAndValues(source)
  with nn.intercept_methods(kept):
    hidden = model.apply({"params": params}, tokens, rows=ops.Rows(mask=mask), method=sa_jax.Transformer.hidden)
  logits = model.apply({"params": params}, hidden, method=sa_jax.Transformer.logits)
  losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
  means = jnp.stack([jnp.stack([k.mean((0, 1)), v.mean((0, 1))]) for k, v in zip(kept.keys, kept.values, strict=True)])
  return {"losses": losses.mean(axis=1), "hidden": hidden, "means": means}


def window_mask(length: int, slots: int) -> np.ndarray:
  """bool ``[1, 1, T, T]``: which keys a query sees with a cache of so many slots."""
  query, key = np.arange(length)[:, None], np.arange(length)[None]
  seen = (key <= query) & ((key < SINKS) | (query - key < slots - SINKS))
  return seen[None, None]


def perplexities(board: Board, source: np.ndarray, mask: np.ndarray | None = None) -> dict[str, dict[str, float]]:
  """As `Board.perplexities`, of the dense model with replaced caches or with a mask."""
  found: dict[str, dict[str, float]] = {}
  for (kind, name), rows in board.rows.items():
    chunks = np.array_split(rows, -(-len(rows) // board.flags.chunk))
    losses = [forward(board.model, board.params, jnp.asarray(chunk), source, mask)["losses"] for chunk in chunks]
    found.setdefault(kind, {})[name] = math.exp(np.concatenate(losses).mean())
  return found


def sharer(board: Board, rows: np.ndarray, least: float, most: int) -> Iterator[np.ndarray]:
  """KVSharer's strategy search: yields the layer whose cache each layer uses, with one more layer replaced each time.

  Args:
    board: the model.
    rows: int32 ``[B, T]``, calibration text.
    least: the similarity below which a replacement is undone.
    most: how many layers are replaced at most.
  """
  layers = board.model.config.num_layers
  run = lambda source: forward(board.model, board.params, jnp.asarray(rows), source)
  own = np.arange(layers)
  dense = run(own)
  means = np.asarray(dense["means"]).reshape(layers, 2, -1)
  distance = lambda pair: -np.linalg.norm(means[pair[0]] - means[pair[1]], axis=-1).mean()
  source = own
  for early, late in sorted(itertools.combinations(range(layers), 2), key=distance):
    # A replaced layer has no cache of its own to give, and a layer that gives its cache keeps it.
    if source[late] != late or source[early] != early or late in source[own != late]:
      continue
    tried = np.where(own == late, early, source)
    similarity = cosine(run(tried)["hidden"], dense["hidden"])
    if similarity < least:
      continue
    source = tried
    board.say(f"KVSharer: layer {late} uses the cache of {early}, similarity {similarity:.3f}")
    yield source
    if (source != own).sum() == most:
      return


def cosine(a: jax.Array, b: jax.Array) -> float:
  """Mean cosine similarity of vectors ``[B, T, D]``."""
  return float((jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))).mean())


def measure(
  board: Board, method: str, mixture: str, part: float, source: np.ndarray, mask: np.ndarray | None = None
) -> None:
  """Measures a method once, and stores a row."""
  name = f"{method}: {mixture}"
  if name in board.stored["measured"]:
    return
  begun = time.perf_counter()
  found: Json = board.times_dense(perplexities(board, source, mask))
  made: Json = {"method": method, "mixture": mixture, "part": part, **found, "seconds": time.perf_counter() - begun}
  board.stored["measured"][name] = made | {"source": source.tolist()}
  board.say(f"{name:<40} {100 * part:5.1f} %  {show(found['times_dense'])}")
  board.save()


def main() -> None:
  """Measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add_flags(parser)
  add = parser.add_argument
  add("--slots", type=float, nargs="*", default=[0.75, 0.5, 0.25], help="eviction: of a row's length")
  add("--replaced", type=int, nargs="*", default=[4, 8], help="KVSharer: layers; each is 1 / L of the cache")
  add("--least", type=float, default=0.5, help="KVSharer's least similarity; 0.5 is the paper's")
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  board = Board(flags)
  layers, length = board.model.config.num_layers, flags.length
  for part in flags.slots:
    slots = int(part * length)
    mask = window_mask(length, slots)
    measure(board, "eviction", f"{SINKS} sinks, {slots - SINKS} latest", slots / length, np.arange(layers), mask)
  # Thirty texts of 64 tokens, as in the paper.
  few = np.concatenate([text.calibration[:15, :64] for text in board.texts])
  for count, source in enumerate(sharer(board, few, flags.least, max(flags.replaced, default=0)), 1):
    if count in flags.replaced:
      kind = f"{count} layers replaced, similarity at least {flags.least:g}"
      measure(board, "KVSharer", kind, 1 - count / layers, source)


if __name__ == "__main__":
  main()
