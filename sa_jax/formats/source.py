"""Opens models in files by path or hub id, in any format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.files import check_regular, named
from sa_jax.formats import hf_config, hf_plan
from sa_jax.formats.gguf_file import GgufFile
from sa_jax.formats.hf_folder import HfFolder
from sa_jax.formats.hub import Need, locate
from sa_jax.formats.orbax_folder import OrbaxFolder, is_checkpoint
from sa_jax.formats.table import Account, Entry, Index
from sa_jax.formats.tokenizer import Tokenizer
from sa_jax.plan import SharingPlan


class Source(Protocol):
  """A model in files of some format. Only requested data are read.

  Attributes:
    path: the folder or file.
  """

  path: Path

  @property
  def config(self) -> dict[str, Any]:
    """The contents of its ``config.json``, or the equivalent."""
    ...

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The shape of every stored tensor by name."""
    ...

  @property
  def dtypes(self) -> Mapping[str, str]:
    """The dtype of every stored tensor by name, in the format's terms."""
    ...

  def account(self, config: ModelConfig, plan: SharingPlan) -> Account:
    """The use of every tensor under a plan.

    Raises:
      UserError: lists every tensor that is missing, unknown, or does not have the shape given by the config.
    """
    ...

  def read(self, key: str) -> np.ndarray:
    """A tensor in its stored floating-point dtype (float32 if quantised), mapped from the file if possible."""
    ...

  def parameter(self, entry: Entry, index: Index | None = None) -> np.ndarray:
    """The parameter of an entry, or a slice of it; it may be mapped from the file."""
    ...

  def tokenizer(self) -> Tokenizer:
    """Its tokenizer.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    ...

  def save_extras(self, folder: Path) -> None:
    """Writes the tokenizer, the chat template and the generation config, if present."""
    ...


def open_source(name: str | Path, revision: str | None = None, need: Need = "weights") -> Source:
  """Opens a Hugging Face folder, a GGUF file, an sa_jax checkpoint or a model on the Hugging Face hub.

  Args:
    name: its path or hub id.
    revision: for a hub id: a branch, tag or commit.
    need: what will be used: only the config, only the tokenizer, or everything; for a hub id, only that is downloaded.

  Raises:
    UserError: if there is no such model.
  """
  path = locate(name, revision, need)
  if path.is_dir():
    return OrbaxFolder(path) if is_checkpoint(path) else HfFolder(path)
  check_regular(path)
  with named(path), path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise UserError(f"{path} is not a GGUF file; a model is a Hugging Face folder, a GGUF file or an sa_jax checkpoint")
  return GgufFile(path)


def model_of(source: Source, strict: bool = False) -> tuple[ModelConfig, SharingPlan]:
  """The model's config, and its plan, dense if it has none; ``strict`` as in `sa_jax.from_pretrained`.

  Raises:
    UserError: lists everything in its config that is missing, malformed or not implemented.
  """
  config = hf_config.read(source.config, strict)
  return config, hf_plan.read_plan(source.config, config.num_layers)


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, an sa_jax checkpoint, a GGUF file or a model on the hub.

  Args:
    name: its path or hub id.
    revision: for a hub id: a branch, tag or commit.

  Raises:
    UserError: if there is no such model, or its tokenizer is missing or damaged.
  """
  return open_source(name, revision, "tokenizer").tokenizer()
