"""The README of an exported folder: the model, which layers share, the savings, and how to use it."""

from __future__ import annotations

import dataclasses

from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.formats.hf_plan import is_plain
from sa_jax.formats.hub import parse_hub_id
from sa_jax.plan import SharingPlan


def model_card(config: ModelConfig, plan: SharingPlan, source: str) -> str:
  """The card, in Markdown with the header that the hub reads.

  Args:
    config: the model.
    plan: which layers share.
    source: the model it was exported from; listed as the base model if it is a hub id.
  """
  plain = is_plain(config, plan)
  tags = ["jax", *([] if plain else ["shared-attention"])]
  header = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
  if found := parse_hub_id(source):
    header.insert(0, f"base_model: {found[0]}")
  parts = ["---", *header, "---", "", *(_dense(config) if plain else _shared(config, plan))]
  return "\n".join(parts) + "\n"


def _dense(config: ModelConfig) -> list[str]:
  return [
    f"# A {config.family} model of {config.num_layers} layers",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
    "```",
  ]


def _shared(config: ModelConfig, plan: SharingPlan) -> list[str]:
  before, after = cost(dataclasses.replace(config, value_dim=None), None), cost(config, plan)
  narrow = [f"Values are {config.value_width} numbers a head, keys {config.head_dim}.", ""]
  rows = [
    ("parameters", before.params, after.params),
    ("KV cache, bytes per token", before.kv_bytes_per_token, after.kv_bytes_per_token),
  ]
  return [
    f"# A {config.family} model of {config.num_layers} layers, {len(plan.followers)} of which share attention weights",
    "",
    f"The plan is `{plan}`. A follower (`|`) uses the attention weights of the anchor (`o`) before it: it has no",
    "queries and no keys, and caches values alone ([Shared Attention](https://arxiv.org/abs/2407.12866)).",
    "",
    "```",
    *_picture(plan),
    "```",
    "",
    *(narrow if config.value_width < config.head_dim else []),
    "| | dense | this model | |",
    "|---|---|---|---|",
    *(f"| {name} | {old:,} | {new:,} | {100 * (new / old - 1):+.1f} % |" for name, old, new in rows),
    "",
    "The code is in `modeling_shared_attention.py`, beside the weights:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)',
    "```",
    "",
    "In JAX, `sa_jax.from_pretrained` opens it without remote code. Do not open this folder with the dense",
    "family's class (such as `LlamaForCausalLM`): it would initialise the missing projections randomly.",
  ]


def _picture(plan: SharingPlan) -> list[str]:
  """One line per run: a mark for each layer, and a space before each anchor."""
  lines = []
  for run in plan.runs:
    group = "o" + "|" * run.followers
    name = f"layers {run.layers[0]}-{run.layers[-1]}" if len(run.layers) > 1 else f"layer {run.layers[0]}"
    lines.append(f"{name}: {' '.join([group] * run.groups)}")
  return lines
