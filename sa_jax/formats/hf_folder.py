"""Hugging Face folders: ``config.json`` and weights in safetensors or PyTorch's own format."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.files import check_regular, is_remote
from sa_jax.formats.extras import copy_extras, read_json
from sa_jax.formats.hf_config import family_of
from sa_jax.formats.hf_names import usual_names
from sa_jax.formats.hf_text import text_part
from sa_jax.formats.quantised import Files, Recipe, Stored, fault_of, recipes
from sa_jax.formats.shards import FLOATS, BinFile, SafetensorsFile, Shard, check_types
from sa_jax.formats.table import Account, Entry, Index, account
from sa_jax.formats.tokenizer import Tokenizer, read_tokenizer, warn_of_tokenizer
from sa_jax.plan import SharingPlan

# Index file and single file of each format. The first pair found is read; within a pair, as in transformers, the
# single file takes precedence: the index may be left over from an earlier save.
_FORMATS: tuple[tuple[str, str, type[Shard]], ...] = (
  ("model.safetensors.index.json", "model.safetensors", SafetensorsFile),
  ("pytorch_model.bin.index.json", "pytorch_model.bin", BinFile),
)


class HfFolder:
  """A folder with ``config.json`` and weights in safetensors or PyTorch's own format, in one file or in shards."""

  def __init__(self, path: Path):
    self.path = path

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """See `Source.config`."""
    if not (self.path / "config.json").exists() and (self.path / "adapter_config.json").exists():
      raise UserError(f"{self.path} is an adapter, not a model; merge it into its base model and open the result")
    config = read_json(self.path / "config.json")
    # Chat models list further end tokens here, which generation needs.
    file = self.path / "generation_config.json"
    if file.exists() and "eos_token_id" in (generation := read_json(file)):
      config["eos_token_id"] = generation["eos_token_id"]
    return config

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """See `Source.shapes`."""
    made = self._recipes
    shape = lambda own: made[own].shape if own in made else self._shard_of[own].shapes[own]
    return {key: shape(own) for key, own in self._stored.items()}

  @property
  def dtypes(self) -> dict[str, str]:
    """See `Source.dtypes`."""
    stored = lambda own: self._recipes[own].parts[0] if own in self._recipes else own
    return {key: self._shard_of[stored(own)].dtypes[stored(own)] for key, own in self._stored.items()}

  @functools.cached_property
  def _stored(self) -> dict[str, str]:
    """The family's tensor names → the files' names."""
    return usual_names(self._whole, family_of(self.config))

  @property
  def _recipes(self) -> dict[str, Recipe]:
    return self._quantised[0]

  @functools.cached_property
  def _quantised(self) -> tuple[dict[str, Recipe], set[str]]:
    """Tensors computed from others, and tensors that are only parts of them."""
    settings = text_part(self.config).get("quantization_config")
    if settings is None or fault_of(settings) is not None:
      return {}, set()
    shards = self._shard_of
    stored = {key: Stored(shard.shapes[key], shard.dtypes[key]) for key, shard in shards.items()}
    return recipes(Files(stored, settings, lambda key: shards[key].read(key)))

  @functools.cached_property
  def _whole(self) -> list[str]:
    """The stored tensors that are parameters, or parts of packed ones.

    Raises:
      UserError: if another tensor is not floating-point.
    """
    made, parts = self._quantised
    plain = [key for key in self._shard_of if key not in made and key not in parts]
    for path in dict.fromkeys(self._shard_of[key].path for key in plain):
      own = {key: self._shard_of[key].dtypes[key] for key in plain if self._shard_of[key].path == path}
      check_types(path, own, FLOATS)
    return [*plain, *made]

  @functools.cached_property
  def _shard_of(self) -> dict[str, Shard]:
    for index, single, kind in _FORMATS:
      if (self.path / single).exists():
        return self._by_tensor([self.path / single], kind)
      if (self.path / index).exists():
        return self._open_shards(self.path / index, kind)
    names = " and no ".join(name for index, single, _ in _FORMATS for name in (single, index))
    raise UserError(f"there is no {names} in {self.path}")

  def _open_shards(self, index: Path, kind: type[Shard]) -> dict[str, Shard]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
      raise UserError(f"{index} has no 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    # A plain file name cannot leave the folder.
    if outside := [name for name in names if Path(name).name != name or not name.endswith(kind.suffix)]:
      raise UserError(f"{index} names files that are not {kind.suffix[1:]} files of its folder: {outside}")
    if missing := [name for name in names if not (self.path / name).is_file()]:
      raise UserError(f"shards are missing from {self.path}: {', '.join(missing)}")
    shard_of = self._by_tensor([self.path / name for name in names], kind)
    file_of = {key: shard.path.name for key, shard in shard_of.items()}
    if absent := sorted(key for key, name in weight_map.items() if file_of.get(key) != name):
      raise UserError(f"{index} lists tensors that are not in the file it gives for them: {absent}")
    return shard_of

  def _by_tensor(self, files: Sequence[Path], kind: type[Shard]) -> dict[str, Shard]:
    shard_of: dict[str, Shard] = {}
    for file in files:
      check_regular(file)
      shard = kind(file)
      for key in shard.shapes:
        if key in shard_of:
          raise UserError(f"{key} is in both {shard_of[key].path.name} and {shard.path.name} of {self.path}")
        shard_of[key] = shard
    return shard_of

  def account(self, config: ModelConfig, plan: SharingPlan) -> Account:
    """See `Source.account`."""
    return account(self.shapes, config, plan, self.path)

  def read(self, key: str, rows: slice | None = None) -> np.ndarray:
    """See `Source.read` and `Shard.read`."""
    own = self._stored[key]
    if (recipe := self._recipes.get(own)) is not None:
      return recipe.dequantise(*(self._shard_of[part].read(part) for part in recipe.parts))
    return self._shard_of[own].read(own, rows)

  def parameter(self, entry: Entry, index: Index | None = None) -> np.ndarray:
    """See `Source.parameter`."""
    if entry.stacked and entry.expert is not None:
      return entry.part_of(self._of_expert(entry.key, entry.expert[0]), index)
    rows = entry.rows_of(index) if is_remote(self.path) else None  # mapped files are read only where used
    return entry.part_of(self.read(entry.key, rows), index)

  def _of_expert(self, key: str, number: int) -> np.ndarray:
    """One expert's slice of a tensor with all experts."""
    rows = slice(number, number + 1)
    recipe = self._recipes.get(self._stored[key])
    if recipe is None or not recipe.by_row:
      return self.read(key, rows)[number]
    return recipe.dequantise(*(self._shard_of[part].read(part, rows)[rows] for part in recipe.parts))[0]

  def tokenizer(self) -> Tokenizer:
    """See `Source.tokenizer`."""
    return read_tokenizer(self.path)

  def save_extras(self, folder: Path) -> None:
    """See `Source.save_extras`."""
    warn_of_tokenizer(self.path)
    copy_extras(self.path, folder)
