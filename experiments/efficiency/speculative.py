"""Speculative decoding of SmolLM2: acceptance rate of drafts, and tokens per second compared with greedy decoding.

Drafts are the model under plans with many followers, refitted, and its first layers alone. See README.md in this
folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sa_jax
from sa_jax import bench
from sa_jax.analysis.refit import refit
from sa_jax.decode import Draft, Settings, speculate

PLANS = {
  8: "5:6-7,11:12,14:15,21:22,24:25,26:27-28",
  16: "3:4,5:6-9,11:12-15,18:19-22,24:25,26:27-28",
  20: "2:3-4,5:6-9,10:11-15,16:17-20,21:22-23,24:25,26:27-28",
}
"""By number of followers, for 30 layers."""


def drafts(model: sa_jax.Transformer, params: Any, rows: np.ndarray, chosen: argparse.Namespace) -> dict[str, Any]:
  """Functions that create the drafts, by name."""

  def refitted(plan: str) -> Draft:
    parsed = sa_jax.SharingPlan.parse(plan, model.config.num_layers)
    found = refit(model, params, parsed, rows, on_device=True)
    return Draft(found.model, found.params, chosen.ahead)

  made: dict[str, Callable[[], Draft]] = {
    f"{count} followers, refitted": lambda plan=PLANS[count]: refitted(plan) for count in chosen.followers
  }
  made |= {
    f"first {layers} layers": lambda layers=layers: Draft.early_exit(model, params, layers, chosen.ahead)
    for layers in chosen.exits
  }
  return made


def main() -> None:
  """Measures each draft and prints one line each."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
  parser.add_argument("--text", type=Path, required=True, help="where prompts and the text to refit with come from")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--prompts", type=int, default=8, help="generated one after the other")
  parser.add_argument("--new-tokens", type=int, default=128)
  parser.add_argument("--ahead", type=int, default=4)
  parser.add_argument("--followers", type=int, nargs="*", default=list(PLANS), choices=list(PLANS))
  parser.add_argument("--exits", type=int, nargs="*", default=[15, 25])
  parser.add_argument("--refit-rows", type=int, default=64, help="of 256 tokens")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", type=Path, required=True)
  arguments = parser.parse_args()

  tokenizer = sa_jax.load_tokenizer(arguments.model)
  model, params = sa_jax.from_pretrained(arguments.model, "dense", "float32", layout="layers")
  endless = lambda model: model.clone(config=dataclasses.replace(model.config, eos_token_ids=()))
  cast = lambda model: endless(model.clone(config=dataclasses.replace(model.config, dtype=arguments.dtype)))
  lower = lambda tree: jax.tree.map(lambda x: jax.numpy.asarray(x, arguments.dtype), tree)
  encoded = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[:400_000], special=False)
  text = sa_jax.rows_of(encoded[: len(encoded) // 2], 256, arguments.refit_rows, tokenizer.opening())
  prompts = sa_jax.rows_of(encoded[len(encoded) // 2 :], 64, arguments.prompts, tokenizer.opening())[:, None]

  new, small = arguments.new_tokens, lower(params)
  results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "new_tokens": new, "ahead": arguments.ahead}

  def rate(call: Callable[[], Any]) -> dict[str, float]:
    timing, count = bench.timed(call, arguments.repeats, warmup=0), len(prompts) * new
    return {"tokens_per_second": count / timing.median, "low": count / timing.high, "high": count / timing.low}

  greedy = lambda: [sa_jax.generate(cast(model), small, prompt, max_new_tokens=new).tokens for prompt in prompts]
  plain = np.concatenate(greedy())
  results["greedy"] = rate(greedy)
  print(f"{'plain greedy':<28} {results['greedy']['tokens_per_second']:8,.0f} tokens/s", flush=True)
  results["drafts"] = {}
  for name, make in drafts(model, params, text, arguments).items():
    draft = make()
    draft = dataclasses.replace(draft, model=cast(draft.model), params=lower(draft.params))
    run = lambda: [speculate(cast(model), small, draft, prompt, None, Settings(new)) for prompt in prompts]  # noqa: B023
    found = run()
    kept = (new - 1) / np.mean([each.rounds[0] for each in found])
    equal = float(np.mean(np.concatenate([each.tokens for each in found]) == plain))
    results["drafts"][name] = {"tokens_per_round": kept, "equal_tokens": equal, **rate(run)}
    speed, ahead = results["drafts"][name]["tokens_per_second"], arguments.ahead
    print(
      f"{name:<28} {speed:8,.0f} tokens/s, {speed / results['greedy']['tokens_per_second']:.2f} × greedy; "
      f"{kept:.2f} tokens a round, {kept - 1:.2f} of {ahead} proposals kept; {equal:.1%} of tokens are greedy's",
      flush=True,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
