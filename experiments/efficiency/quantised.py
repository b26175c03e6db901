"""How quantised caches change SmolLM2-135M's perplexity, with all attention reading from them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sa_jax
from sa_jax import ops
from sa_jax.nn import Cache


def loss(params: Any, tokens: jax.Array, model: sa_jax.Transformer) -> jax.Array:
  """Mean loss of rows that are written to an empty cache and attend to its contents."""
  length = tokens.shape[1]
  cache = Cache.empty(model.config, model.plan, *tokens.shape)
  rows = ops.Rows(jnp.full(len(tokens), length, jnp.int32), offset=jnp.zeros(len(tokens), jnp.int32))
  hidden, _ = model.apply({"params": params}, tokens, cache, rows, method=model.extend)
  head = lambda hidden: model.apply({"params": params}, hidden, method=model.logits)
  total, weight = ops.next_token_loss(head, hidden, tokens, chunk=64)
  return total / weight


def main() -> None:
  """Prints perplexities by dtype and cache."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
  parser.add_argument("--text", type=Path, required=True)
  parser.add_argument("--rows", type=int, default=4, help="of 512 tokens")
  arguments = parser.parse_args()
  text = arguments.text.read_text(encoding="utf-8")
  tokenizer = sa_jax.load_tokenizer(arguments.model)
  tokens = sa_jax.rows_of(tokenizer.encode(text, special=False), 512, arguments.rows, tokenizer.opening())
  for dtype in ("float32", "bfloat16"):
    model, params = sa_jax.from_pretrained(arguments.model, None, dtype, layout="layers")
    for cache_dtype in (None, *ops.FORMATS):
      config = dataclasses.replace(model.config, cache_dtype=cache_dtype)
      of_row = jax.jit(lambda params, row, model=sa_jax.Transformer(config, model.plan): loss(params, row, model))
      perplexity = math.exp(np.mean([float(of_row(params, row[None])) for row in tokens]))
      print(f"{dtype:<9} cache {cache_dtype or dtype:<9} {perplexity:.3f}", flush=True)


if __name__ == "__main__":
  main()
