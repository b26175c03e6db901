"""The model card of a model made by `share`: its plan, how it was made, and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sa_jax.analysis.mixture import bytes_of
from sa_jax.analysis.share import Effort, Shared
from sa_jax.analysis.texts import Text
from sa_jax.config import ModelConfig
from sa_jax.costs import cost


def results(made: Shared) -> dict[str, dict[str, float]]:
  """Perplexities by text: ``dense``, ``shared``, and ``undistilled`` after a distillation."""
  columns = {"dense": made.dense, "shared": made.shared}
  if made.undistilled is not None:
    columns["undistilled"] = made.undistilled
  return {name: {label: each[name].perplexity for label, each in columns.items()} for name in made.dense}


def card(source: str, config: ModelConfig, made: Shared, texts: Sequence[Text], effort: Effort, seconds: float) -> str:
  """The card, in Markdown.

  Args:
    source: the dense model's name.
    config: the dense model's.
    made: the shared model.
    texts: the texts that it was fitted to and evaluated on.
    effort: the effort settings.
    seconds: the total time.
  """
  plan, mixture = made.plan, made.mixture
  config = dataclasses.replace(config, dtype="bfloat16", cache_dtype=None)
  dense, shared = cost(config, None), cost(mixture.config(config), plan)
  saved = lambda old, new: f"| {old:,} | {new:,} | {100 * (new / old - 1):+.1f} % |"
  gone = bytes_of(config, mixture)
  rows = [
    "| parameters " + saved(dense.params, shared.params),
    "| KV cache, bytes per token " + saved(dense.kv_bytes_per_token, shared.kv_bytes_per_token),
  ]
  for name, numbers in results(made).items():
    old, new = numbers["dense"], numbers["shared"]
    rows.append(f"| perplexity, {name} | {old:.3f} | {new:.3f} | {new / old:.3f} × |")
  served = [] if mixture.cache_dtype is None else [f"Generate with `--cache-dtype {mixture.cache_dtype}`.", ""]
  grouped = any(report.part == "group" and report.after < report.before for report in made.reports)
  mlps = effort.mlp and config.experts is None
  distilled = made.undistilled not in (None, made.shared)
  done = {"W_O": True, "MLPs": mlps, "local reconstruction": grouped, "distillation": distilled}
  lines = [
    f"# {source}, {len(plan.followers)} of {plan.num_layers} layers of which share attention weights",
    "",
    f"The plan is `{plan}`: each group is an anchor and the layers that use its attention weights",
    "([Shared Attention](https://arxiv.org/abs/2407.12866)). Open the folder with `sa_jax.from_pretrained`.",
    "",
    "| | dense | this model | |",
    "|---|---|---|---|",
    *rows,
    "",
    f"Of a token's cache in bfloat16: {', '.join(f'{name} {count:,} bytes' for name, count in gone.items() if count)}.",
    "",
    *served,
    f"Made in {seconds:.0f} s by `sa-jax share`; recovery: {', '.join(name for name, value in done.items() if value)}.",
    "Perplexities are of the judging rows. Nothing was fitted to them, but the plan and the recovery were selected on",
    "them, so they are slightly optimistic.",
    "",
    "| text | rows to fit to | rows to judge by | tokens per row |",
    "|---|---|---|---|",
    *(f"| {text.name} | {len(text.calibration)} | {len(text.judging)} | {text.judging.shape[1]} |" for text in texts),
  ]
  return "\n".join(lines) + "\n"
