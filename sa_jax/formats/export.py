"""Exports sa_jax checkpoints as Hugging Face folders, with PyTorch code for Shared Attention if needed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.display import Progress
from sa_jax.distributed import runs_on_first
from sa_jax.errors import UserError
from sa_jax.files import as_path, copy, new_file, new_folder
from sa_jax.formats import hf_config, hf_plan
from sa_jax.formats.lazy import LazyTensor, contiguous
from sa_jax.formats.model_card import model_card
from sa_jax.formats.opened import open_model
from sa_jax.formats.table import Entry, entries, pack
from sa_jax.plan import PlanLike, SharingPlan
from sa_jax.trees import Params, Tree

_CODE = Path(__file__).parent / "pytorch" / "modeling_shared_attention.py"
WITHOUT_CODE = ("baichuan", "internlm2", "internlm3", "mimo", "minicpm")
"""Families without a class in transformers, which our PyTorch code for followers would need."""
_SHARD_BYTES = 500_000_000


@runs_on_first("the export")
def export(
  src: str | Path,
  dst: str | Path,
  *,
  plan: PlanLike = None,
  revision: str | None = None,
  shard_bytes: int = _SHARD_BYTES,
  progress: Progress | None = None,
) -> None:
  """Writes a model as a Hugging Face folder, bit for bit in the stored dtype.

  A dense model becomes an ordinary transformers folder (for Baichuan and InternLM, after adding the original folder's
  code and ``auto_map``). A model with followers, or with values narrower than keys, has a separate model type and
  includes ``modeling_shared_attention.py``, which transformers runs with ``trust_remote_code=True``; without it,
  transformers opens nothing. Followers have no queries and keys, and cache only values. Memory holds one shard at a
  time.

  Args:
    src: the model to read; see `from_pretrained`.
    dst: the folder to write, which must not exist. It appears only when complete.
    plan: see `from_pretrained`.
    revision: for a hub id: a branch, tag or commit.
    shard_bytes: approximate size of a safetensors file.
    progress: called with (tensors written, total tensors).

  Raises:
    UserError: see `from_pretrained`; or if ``dst`` exists, or the model has followers or narrow values and its family
      has no PyTorch code for them.
  """
  opened = open_model(src, plan, revision=revision)
  config, made = opened.config, opened.plan
  values = _config(config, made)
  with new_folder(as_path(dst)) as folder:
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    opened.source.save_extras(folder)
    if not hf_plan.is_plain(config, made):
      copy(_CODE, folder / _CODE.name)
    generation = folder / "generation_config.json"
    if not generation.exists():
      generation.write_text(json.dumps(_generation(config), indent=2), encoding="utf-8")
    (folder / "README.md").write_text(model_card(config, made, str(src)), encoding="utf-8")
    _write_shards(opened.tree(), folder, _tensors(config, made), shard_bytes, progress)


def _config(config: ModelConfig, plan: SharingPlan) -> dict[str, Any]:
  values = hf_config.write(config)
  if hf_plan.is_plain(config, plan):
    return values
  if config.family in WITHOUT_CODE:
    what = "followers" if plan.followers else "narrow values"
    raise UserError(
      f"a {config.family} model with {what} cannot be exported: transformers has no class for it; without {what} it can"
    )
  name = f"Shared{values['architectures'][0].removesuffix('ForCausalLM')}"
  return values | {
    "architectures": [f"{name}ForCausalLM"],
    "auto_map": {
      "AutoConfig": f"{_CODE.stem}.{name}Config",
      "AutoModelForCausalLM": f"{_CODE.stem}.{name}ForCausalLM",
    },
    "model_type": hf_plan.SHARED + config.family,
    "shared_attention": hf_plan.write_plan(plan, config),
  }


def _generation(config: ModelConfig) -> dict[str, Any]:
  """The generation config for transformers."""
  ends = list(config.eos_token_ids)
  values = {
    "bos_token_id": config.bos_token_id,
    "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    "pad_token_id": config.pad_token_id,
  }
  return {"_from_model_config": True} | {name: value for name, value in values.items() if value is not None}


def _tensors(config: ModelConfig, plan: SharingPlan) -> list[list[Entry]]:
  """The checkpoint's tensors, each as the parameters that it consists of."""
  kept = [entry.under(plan) for entry in entries(config) if not entry.is_dropped(plan)]
  return [list(parts) for _, parts in itertools.groupby(kept, key=lambda entry: entry.key)]


def _shards(tensors: list[list[Entry]], itemsize: int, limit: int) -> Iterator[list[list[Entry]]]:
  shard: list[list[Entry]] = []
  size = 0
  for parts in tensors:
    nbytes = int(np.prod(parts[0].stored_shape)) * itemsize
    if shard and size + nbytes > limit:
      yield shard
      shard, size = [], 0
    shard.append(parts)
    size += nbytes
  yield shard


def _write_shards(
  tree: Params, folder: Path, tensors: list[list[Entry]], limit: int, progress: Progress | None
) -> None:
  from safetensors.numpy import save_file

  def read(entry: Entry) -> np.ndarray:
    node: Tree = tree
    for name in entry.path:
      node = node[name]
    leaf: LazyTensor = node
    return leaf.read(0 if entry.expert is None else entry.expert[0])

  shards = list(_shards(tensors, jax.tree.leaves(tree)[0].dtype.itemsize, limit))
  weight_map: dict[str, str] = {}
  done = 0
  for number, shard in enumerate(shards, start=1):
    alone = len(shards) == 1
    name = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    made = {parts[0].key: contiguous(pack([(entry, read(entry)) for entry in parts])) for parts in shard}
    with new_file(folder / name) as file:
      file.touch()
      mode = file.stat().st_mode  # safetensors makes its files unreadable for other users
      save_file(made, file, metadata={"format": "pt"})
      file.chmod(mode)
    weight_map |= dict.fromkeys(made, name)
    done += len(shard)
    if progress is not None:
      progress(done, len(tensors))
  if len(shards) > 1:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
