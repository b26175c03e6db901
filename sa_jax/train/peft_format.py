"""Adapters in the format of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.files import as_path, new_folder
from sa_jax.formats.extras import read_json
from sa_jax.formats.table import Entry, entries
from sa_jax.nn import Transformer
from sa_jax.params import unstack_runs
from sa_jax.train.lora import INPUT_AXES, LoraConfig, abstract_adapters
from sa_jax.trees import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
_REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "fan_in_fan_out")
"""Settings of unsupported adapters, unless they are empty."""


def save_adapters(path: Path, model: Transformer, adapters: Tree, config: LoraConfig, base: str = "") -> None:
  """Writes adapters that PEFT can load on the corresponding Hugging Face model, and `load_adapters` here.

  A plan's followers have none for queries and keys; on a dense model, PEFT leaves those unchanged.

  Args:
    path: a folder that does not exist yet.
    model: the adapted model.
    adapters: in either layout.
    config: the adapters' config.
    base: the model's name or path, for PEFT.

  Raises:
    UserError: if the model's family packs projections into one tensor, experts are adapted, or the folder cannot be
      written.
  """
  if model.config.experts is not None and (adapted := sorted({*config.targets} & _OF_EXPERTS)):
    raise UserError(
      f"PEFT's format does not support adapters of experts ({', '.join(adapted)}): choose targets of attention"
    )
  layers = adapters["layers"] if "layers" in adapters else unstack_runs(adapters["runs"], model.plan)
  tensors: dict[str, np.ndarray] = {}
  modules = _modules(model.config)
  for module, (layer, part, name) in modules.items():
    pair = layers.get(layer, {}).get(part, {}).get(name)
    if pair is not None:
      a, b = (np.asarray(pair[side], np.float32) for side in ("lora_a", "lora_b"))
      tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, config.rank).T)
      tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(config.rank, -1).T)
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": config.rank,
    "lora_alpha": config.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules if modules[module][2] in config.targets}),
    "inference_mode": True,
  }
  with new_folder(path) as folder:
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))


def load_adapters(path: Path, model: Transformer) -> tuple[dict[str, Tree], LoraConfig]:
  """Reads adapters written by PEFT or `save_adapters`.

  Returns:
    The adapters, float32 in the layer layout, for `sa_jax.train.merge` and `attach` with parameters in that layout, and
    their config.

  Raises:
    UserError: if they are of an unsupported kind, or for a different model; lists all problems.
  """
  path = as_path(path)
  settings = read_json(path / CONFIG)
  faults = [f"{name} = {settings[name]!r} is not supported" for name in _REFUSED if settings.get(name)]
  for name, allowed in {"peft_type": "LORA", "bias": "none"}.items():
    if settings.get(name, allowed) != allowed:
      faults.append(f"{name} = {settings[name]!r}; must be {allowed!r}")
  rank, alpha = settings.get("r"), settings.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
    faults.append(f"r = {rank!r} and lora_alpha = {alpha!r}; must be positive numbers")
  if faults:
    raise UserError.of(str(path / CONFIG), faults)
  assert isinstance(rank, int)
  assert isinstance(alpha, int | float)
  try:
    tensors = load((path / WEIGHTS).read_bytes())
  except Exception as error:  # safetensors has its own types
    raise UserError(f"{path / WEIGHTS} cannot be read: {error}") from None
  # rsLoRA divides by the square root of the rank.
  scaled = alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)
  layers, targets = _ours(tensors, model, rank, path / WEIGHTS)
  return {"layers": layers}, LoraConfig(rank, scaled, targets)


def _ours(
  tensors: Mapping[str, np.ndarray], model: Transformer, rank: int, file: Path
) -> tuple[dict[str, Tree], tuple[str, ...]]:
  """A file's tensors as adapters in the layer layout, and the adapted projections."""
  modules = _modules(model.config)
  every = tuple(INPUT_AXES)
  shapes = abstract_adapters(model, LoraConfig(rank, 1.0, every), layout="layers")["layers"]
  layers: dict[str, dict[str, dict[str, dict[str, np.ndarray]]]] = {}
  faults = []
  for key, tensor in sorted(tensors.items()):
    found = _KEY.fullmatch(key)
    place = modules.get(found["module"]) if found else None
    if found is None or place is None:
      faults.append(f"{key} is not an adapter for a projection of this model")
      continue
    layer, part, name = place
    leaf = f"lora_{found['side'].lower()}"
    wanted = shapes[layer].get(part, {}).get(name)
    if wanted is None:
      continue  # queries and keys of a follower, which has none
    shape = wanted[leaf].shape
    flat = (rank, math.prod(shape[:-1])) if leaf == "lora_a" else (math.prod(shape[1:]), rank)
    if tensor.shape != flat:
      faults.append(f"{key} has shape {tensor.shape}; must be {flat}")
      continue
    adapters = layers.setdefault(layer, {}).setdefault(part, {}).setdefault(name, {})
    adapters[leaf] = tensor.astype(np.float32).T.reshape(shape)
  for layer, parts in layers.items():
    for part, names in parts.items():
      faults += [f"layer {layer} has half of the adapter of {part} {name}" for name in names if len(names[name]) < 2]
  if faults or not layers:
    raise UserError.of(str(file), faults[:20] or ["it has no adapter of this model"])
  used = {name for parts in layers.values() for names in parts.values() for name in names}
  return dict(layers), tuple(name for name in every if name in used)


def _modules(config: ModelConfig) -> dict[str, tuple[str, str, str]]:
  """From a Hugging Face model's linear modules to our layer, part and name.

  Raises:
    UserError: if the family packs several projections into one.
  """

  def is_packed(entry: Entry) -> bool:
    return bool(entry.view) or entry.part[:2] != (0, entry.part[2])

  found = {}
  for entry in entries(config):
    if "experts" in entry.path or "shared" in entry.path:  # adapters of experts are unsupported
      continue
    if entry.path[0] == "layers" and entry.path[-1] == "kernel" and entry.path[-2] in INPUT_AXES:
      if is_packed(entry):
        raise UserError(f"{config.family} models pack projections into {entry.key}, which PEFT adapts as one")
      _, layer, part, name, _ = entry.path
      found[entry.key.removesuffix(".weight")] = (layer, part, name)
  return found
