"""Where tensors come from: Hugging Face folders and hub ids, or GGUF files, read lazily under Hugging Face's names."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sa_jax.errors import UserError
from sa_jax.formats.gguf_file import GgufFile
from sa_jax.formats.shards import BinFile, SafetensorsFile, Shard

EXTRAS = (
  "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What travels with a model besides its config and weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# By the index file and the single file that a folder may have; the first pair found is read, and of a pair, as
# transformers does, the single file: an index may have been left by an earlier save.
_FORMATS: tuple[tuple[str, str, type[Shard]], ...] = (
  ("model.safetensors.index.json", "model.safetensors", SafetensorsFile),
  ("pytorch_model.bin.index.json", "pytorch_model.bin", BinFile),
)


class Source(Protocol):
  """A checkpoint in a foreign format.

  Attributes:
    path: the folder or file.
    config: the contents of its Hugging Face ``config.json``, or what is equivalent.
    shapes: every tensor's name and shape.
  """

  path: Path
  config: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]

  def read(self, key: str) -> np.ndarray:
    """One tensor, in its stored floating-point dtype (float32 if it is quantised), mapped from the file if possible."""
    ...

  def save_extras(self, folder: Path) -> None:
    """Writes the tokenizer, the chat template and the generation config, as far as there are any."""
    ...


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: if the file is missing or does not hold a JSON object.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"there is no {path.name} in {path.parent}") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable JSON: {error}") from None
  if not isinstance(values, dict):
    raise UserError(f"{path} must hold a JSON object, and holds a {type(values).__name__}")
  return values


def copy_extras(source: Path, folder: Path) -> None:
  """Copies the `EXTRAS` that a folder has."""
  for name in EXTRAS:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


class HfFolder:
  """A folder with ``config.json`` and weights in safetensors or PyTorch's own format, in one file or in shards."""

  def __init__(self, path: Path):
    self.path = path
    self.config = read_json(path / "config.json")
    self._add_generation_config()
    self._shard_of: dict[str, Shard] = {}
    for index, single, kind in _FORMATS:
      if (path / single).exists():
        self._open(kind(path / single))
        break
      if (path / index).exists():
        self._open_shards(path / index, kind)
        break
    else:
      names = " and no ".join(name for index, single, _ in _FORMATS for name in (single, index))
      raise UserError(f"there is no {names} in {path}")
    self.shapes = {key: shard.shapes[key] for key, shard in self._shard_of.items()}

  def _add_generation_config(self) -> None:
    """Chat models name further end tokens here, which generation must know."""
    file = self.path / "generation_config.json"
    if file.exists() and "eos_token_id" in (generation := read_json(file)):
      self.config["eos_token_id"] = generation["eos_token_id"]

  def _open_shards(self, index: Path, kind: type[Shard]) -> None:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
      raise UserError(f"{index} has no 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    # A plain name cannot leave the folder.
    if outside := [name for name in names if Path(name).name != name or not name.endswith(kind.suffix)]:
      raise UserError(f"{index} names files that are not {kind.suffix[1:]} files of its folder: {outside}")
    if missing := [name for name in names if not (self.path / name).is_file()]:
      raise UserError(f"shards are missing from {self.path}: {', '.join(missing)}")
    for name in names:
      self._open(kind(self.path / name))
    file_of = {key: shard.path.name for key, shard in self._shard_of.items()}
    if absent := sorted(key for key, name in weight_map.items() if file_of.get(key) != name):
      raise UserError(f"{index} lists tensors that are not in the file it gives for them: {absent}")

  def _open(self, shard: Shard) -> None:
    for key in shard.shapes:
      if key in self._shard_of:
        raise UserError(f"{key} is in both {self._shard_of[key].path.name} and {shard.path.name} of {self.path}")
      self._shard_of[key] = shard

  def read(self, key: str) -> np.ndarray:
    """See `Source.read`."""
    return self._shard_of[key].read(key)

  def save_extras(self, folder: Path) -> None:
    """See `Source.save_extras`."""
    copy_extras(self.path, folder)


def locate(name: str | Path, revision: str | None = None) -> Path:
  """The path of a model that is given by its path or its id on the Hugging Face hub.

  A hub id is downloaded into huggingface_hub's cache, with its token and settings (``HF_HUB_OFFLINE``, ``HF_HOME``).

  Args:
    name: a path, or an id such as ``org/model``; a path that exists wins.
    revision: of a hub id: a branch, tag or commit.

  Raises:
    UserError: if there is no such path and no such hub model, or a revision is given for a path.
  """
  path = Path(name)
  if path.exists() or not _HUB_ID.fullmatch(str(name)):
    if revision is not None:
      raise UserError(f"revision {revision!r} is for models on the hub, and {name} is a path")
    if not path.exists():
      raise UserError(f"there is no file or folder {path}, and it has not the form of a hub id, org/model")
    return path
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

  try:
    # What lies beside a model, in folders or under other names, is the same weights in other forms.
    download = functools.partial(snapshot_download, str(name), revision=revision, ignore_patterns=["*/*"])
    files = download(allow_patterns=["*.json", *EXTRAS, "model*.safetensors"])
    if not any(Path(files).glob("*.safetensors")):
      files = download(allow_patterns=["*.json", *EXTRAS, "pytorch_model*.bin"])
  except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
    first = str(error).strip().split("\n")[0]
    raise UserError(f"{name} is no file or folder, and the hub gives no model of that name: {first}") from None
  return Path(files)


def open_source(path: Path) -> Source:
  """Opens a Hugging Face folder or a GGUF file.

  Raises:
    UserError: if it is neither, or is damaged.
  """
  if path.is_dir():
    return HfFolder(path)
  with path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise UserError(f"{path} is not a GGUF file; a model is a Hugging Face folder, a GGUF file or an sa_jax checkpoint")
  return GgufFile(path)
