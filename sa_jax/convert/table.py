"""Which checkpoint tensor becomes which parameter: one small table an architecture.

To add an architecture, add its ``model_type`` to `sa_jax.convert.hf_config` and its table to `TABLES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.plan import SharingPlan


class Rule(NamedTuple):
  """One row of a table.

  Attributes:
    key: the Hugging Face name; ``{layer}`` stands for the layer's number.
    path: our name in the layer layout; ``{layer}`` likewise.
    axes: einops pattern from their axes to ours, in the letters of `sizes`.
  """

  key: str
  path: str
  axes: str


_LAYER, _BLOCK = "model.layers.{layer}", "layers/{layer}"

LLAMA = (
  Rule("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),
  Rule(f"{_LAYER}.input_layernorm.weight", f"{_BLOCK}/attention_norm/scale", "D -> D"),
  Rule(f"{_LAYER}.self_attn.q_proj.weight", f"{_BLOCK}/attention/q_proj/kernel", "(N H) D -> D N H"),
  Rule(f"{_LAYER}.self_attn.k_proj.weight", f"{_BLOCK}/attention/k_proj/kernel", "(K H) D -> D K H"),
  Rule(f"{_LAYER}.self_attn.v_proj.weight", f"{_BLOCK}/attention/v_proj/kernel", "(K H) D -> D K H"),
  Rule(f"{_LAYER}.self_attn.o_proj.weight", f"{_BLOCK}/attention/o_proj/kernel", "D (N H) -> N H D"),
  Rule(f"{_LAYER}.post_attention_layernorm.weight", f"{_BLOCK}/mlp_norm/scale", "D -> D"),
  Rule(f"{_LAYER}.mlp.gate_proj.weight", f"{_BLOCK}/mlp/gate_proj/kernel", "F D -> D F"),
  Rule(f"{_LAYER}.mlp.up_proj.weight", f"{_BLOCK}/mlp/up_proj/kernel", "F D -> D F"),
  Rule(f"{_LAYER}.mlp.down_proj.weight", f"{_BLOCK}/mlp/down_proj/kernel", "D F -> F D"),
  Rule("model.norm.weight", "final_norm/scale", "D -> D"),
  Rule("lm_head.weight", "lm_head/kernel", "V D -> D V"),
)

TABLES: dict[str, tuple[Rule, ...]] = {"llama": LLAMA}

_ANCHOR_ONLY = re.compile(r"layers/\d+/attention/[qk]_proj/")
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Entry(NamedTuple):
  """A tensor that a model of some config has in its checkpoint: a rule for one layer, with sizes filled in."""

  key: str
  path: tuple[str, ...]
  axes: str
  shape: tuple[int, ...]
  sizes: Mapping[str, int]

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """The checkpoint's tensor as our parameter."""
    return einops.rearrange(tensor, self.axes, **self.sizes)

  def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
    """Our parameter as the checkpoint's tensor: the inverse of `to_ours`."""
    theirs, ours = self.axes.split(" -> ")
    return einops.rearrange(parameter, f"{ours} -> {theirs}", **self.sizes)

  def our_shape(self) -> tuple[int, ...]:
    """The parameter's shape."""
    return self.to_ours(np.broadcast_to(np.zeros((), np.bool_), self.shape)).shape


def entries(config: ModelConfig, model_type: str = "llama") -> Iterator[Entry]:
  """Every tensor of a dense checkpoint of this model, in the order of the table."""
  sizes = {
    "V": config.vocab_size,
    "D": config.embed_dim,
    "N": config.num_heads,
    "K": config.num_kv_heads,
    "H": config.head_dim,
    "F": config.mlp_dim,
  }
  for rule in TABLES[model_type]:
    if rule.path == "lm_head/kernel" and config.tie_embeddings:
      continue
    theirs = rule.axes.split(" -> ")[0]
    axes = re.findall(r"\([^)]*\)|\w", theirs)
    shape = tuple(int(np.prod([sizes[letter] for letter in re.findall(r"\w", axis)])) for axis in axes)
    used = {letter: sizes[letter] for letter in re.findall(r"\w", theirs)}
    for layer in range(config.num_layers) if "{layer}" in rule.key else (0,):
      path = tuple(rule.path.format(layer=layer).split("/"))
      yield Entry(rule.key.format(layer=layer), path, rule.axes, shape, used)


class Account(NamedTuple):
  """What becomes of every tensor of a checkpoint.

  Attributes:
    used: entries that become parameters.
    dropped: names of tensors that are not needed, each with the reason.
  """

  used: tuple[Entry, ...]
  dropped: dict[str, str]


def account(
  shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, plan: SharingPlan, where: Any, model_type: str = "llama"
) -> Account:
  """Matches the tensors that a checkpoint holds with those that the planned model needs.

  Args:
    shapes: name → shape of every tensor in the checkpoint.
    config: the model.
    plan: decides which queries and keys are dropped.
    where: the checkpoint, for messages.
    model_type: names the table.

  Raises:
    ValueError: lists, all at once, every tensor that is missing, unknown, or of another shape.
  """
  used, dropped, errors = [], {}, []
  known = set()
  for entry in entries(config, model_type):
    known.add(entry.key)
    found = shapes.get(entry.key)
    if found is not None and tuple(found) != entry.shape:
      errors.append(f"wrong shape: {entry.key} is {list(found)}, the config says {list(entry.shape)}")
    elif _ANCHOR_ONLY.match("/".join(entry.path)) and not plan.is_anchor(layer := int(entry.path[1])):
      if found is not None:
        dropped[entry.key] = f"layer {layer} follows layer {plan.source[layer]}"
    elif found is None:
      errors.append(f"missing: {entry.key} {list(entry.shape)}")
    else:
      used.append(entry)
  for key in shapes:
    if key in known:
      continue
    if key == "lm_head.weight" and config.tie_embeddings:
      dropped[key] = "the output head is tied to the embedding"
    elif _RECOMPUTED.fullmatch(key):
      dropped[key] = "recomputed from rope_theta"
    else:
      errors.append(f"unknown: {key} {list(shapes[key])}")
  if errors:
    raise ValueError(f"{where} does not hold the model that its config describes:\n  " + "\n  ".join(errors))
  return Account(tuple(used), dropped)
