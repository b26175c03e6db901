"""Tokens per second of SmolLM2-135M, greedy, compared with transformers on the same GPU; see README.md."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sa_jax
from sa_jax import bench

NEW_TOKENS = 256
PROMPT = 64


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
  """Seconds of a call that ends on the host: median, fastest and slowest; the first call compiles."""
  timing = bench.timed(call, repeats, warmup=1)
  return {"seconds": timing.median, "low": timing.low, "high": timing.high}


def endless(model: sa_jax.Transformer) -> sa_jax.Transformer:
  """The model without end tokens, so that every row has the full length."""
  return sa_jax.Transformer(dataclasses.replace(model.config, eos_token_ids=()), model.plan)


def ours(path: Path, plan: str, dtype: str, prompts: np.ndarray, count: int, repeats: int) -> tuple[np.ndarray, Any]:
  """The tokens that we generate, ``[B, count]``, and the time."""
  model, params = sa_jax.from_pretrained(path, plan, dtype, layout="layers")
  call = lambda: sa_jax.generate(endless(model), params, prompts, max_new_tokens=count).tokens
  return call(), timed(call, repeats) if repeats else None


class Theirs:
  """transformers on the folder written by `sa_jax.export`."""

  def __init__(self, folder: Path, dtype: str):
    import torch
    import transformers

    self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).cuda().eval()

  def generate(self, prompts: np.ndarray, count: int, cache: str) -> np.ndarray:
    """``[B, count]`` greedy tokens; a static cache compiles the forward pass with CUDA graphs."""
    import torch

    tokens = torch.tensor(prompts, device="cuda")
    with torch.no_grad():
      out = self.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
      )
    return out[:, prompts.shape[1] :].cpu().numpy()


def main() -> None:
  """Measures everything and prints one line each."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
  parser.add_argument("--text", type=Path, required=True, help="where prompts come from")
  parser.add_argument("--plan", default="5:6,7:8,9:10,12:13,14:15,21:22,24:25,26:27")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=Path, required=True)
  arguments = parser.parse_args()

  tokenizer = sa_jax.load_tokenizer(arguments.model)
  encoded = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[:200_000], special=False)
  prompts = sa_jax.rows_of(encoded, PROMPT, 64, tokenizer.opening())
  results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": []}
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  save = lambda: arguments.out.write_text(json.dumps(results, indent=1) + "\n")

  with tempfile.TemporaryDirectory() as folder:
    checkpoint, exported = Path(folder, "sa"), Path(folder, "hf")
    sa_jax.convert(arguments.model, checkpoint, dtype="float32")
    sa_jax.export(checkpoint, exported)

    with jax.default_matmul_precision("highest"):
      mine, _ = ours(checkpoint, "dense", "float32", prompts[:20], 64, 0)
    peer = Theirs(exported, "float32")
    other = peer.generate(prompts[:20], 64, "dynamic")
    results["float32"] = {"prompts": 20, "new_tokens": 64, "equal_prompts": int((mine == other).all(axis=1).sum())}
    print("float32, token for token:", results["float32"], flush=True)
    save()
    del peer

    peer = Theirs(exported, "bfloat16")
    results["peer"] = peer.version
    for batch in (1, 64):
      rows = prompts[:batch]
      dense, plan = (
        functools.partial(ours, checkpoint, each, "bfloat16", rows, NEW_TOKENS, arguments.repeats)
        for each in ("dense", arguments.plan)
      )
      theirs = functools.partial(peer.generate, rows, NEW_TOKENS, "static")
      measured = {
        "dense": lambda: dense()[1],  # noqa: B023
        f"plan {arguments.plan}": lambda: plan()[1],  # noqa: B023
        "transformers, static cache, compiled": lambda: timed(theirs, arguments.repeats),  # noqa: B023
      }
      for name, measure in measured.items():
        timing = measure()
        rate = batch * NEW_TOKENS / timing["seconds"]
        results["rows"].append({"batch": batch, "who": name, "tokens_per_second": rate, **timing})
        print(f"B={batch:<3} {name:<60} {rate:10,.0f} tokens/s", flush=True)
        save()


if __name__ == "__main__":
  main()
