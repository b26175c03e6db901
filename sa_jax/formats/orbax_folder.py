"""Reads sa_jax checkpoints: ``config.json``, the tokenizer, and ``params/``, an Orbax tree in the layer layout.

They are read with TensorStore, Orbax's storage library: any slice of any array, mapped from the file like safetensors.
`experiments/conversion` compares the two.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.files import is_remote
from sa_jax.formats.extras import copy_extras, read_json
from sa_jax.formats.table import Account, Entry, Index, account, entries
from sa_jax.formats.tokenizer import Tokenizer, read_tokenizer, warn_of_tokenizer
from sa_jax.plan import SharingPlan

if TYPE_CHECKING:
  import tensorstore

PARAMS = "params"
_ARRAY = "/.zarray"  # next to an array's chunks: its shape and dtype
_RETRIES = {"max_retries": 5, "initial_delay": "0.5s", "max_delay": "8s"}
_CONTEXT = {
  "cache_pool#index": {"total_bytes_limit": 100_000_000},  # read the array index only once
  "gcs_request_retries": _RETRIES,
  "s3_request_retries": _RETRIES,
}


def is_checkpoint(path: Path) -> bool:
  """Whether the folder is an sa_jax checkpoint."""
  return (path / PARAMS).is_dir()


class OrbaxFolder:
  """A checkpoint written by `sa_jax.convert`, `sa_jax.save` or training; tensors have our own names."""

  def __init__(self, path: Path):
    self.path = path

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """See `Source.config`."""
    return read_json(self.path / "config.json")

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """See `Source.shapes`."""
    return {name: array.shape for name, array in self._arrays.items()}

  @functools.cached_property
  def dtypes(self) -> dict[str, str]:
    """See `Source.dtypes`."""
    return {name: array.dtype.name for name, array in self._arrays.items()}

  @functools.cached_property
  def _arrays(self) -> dict[str, tensorstore.TensorStore]:
    import tensorstore as ts

    folder = f"{self.path.resolve() / PARAMS}/"
    mapped = {"driver": "file", "path": folder, "file_io_mode": {"mode": "memmap"}}
    store = {"driver": "ocdbt", "base": folder if is_remote(self.path) else mapped, "cache_pool": "cache_pool#index"}
    context = ts.Context(_CONTEXT)
    try:
      keys = [key.decode() for key in ts.KvStore.open(store, context=context).result().list().result()]
      names = [key.removesuffix(_ARRAY) for key in keys if key.endswith(_ARRAY)]
      opening = [
        ts.open({"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}, context=context, open=True, read=True)
        for name in names
      ]
      arrays = {name: each.result() for name, each in zip(names, opening, strict=True)}
    except (OSError, ValueError) as error:
      raise UserError(f"{self.path / PARAMS} is not a whole checkpoint: {_first(error)}") from None
    # A missing chunk would be read as zeros.
    chunks = Counter(key.rsplit("/", 1)[0] for key in keys if not key.endswith(_ARRAY))
    lacking = [name for name, array in arrays.items() if chunks[name] != _chunks(array)]
    if lacking or not arrays:
      what = f"parts of {', '.join(lacking)} are missing" if lacking else "it holds no parameters"
      raise UserError(f"{self.path / PARAMS} is not a whole checkpoint: {what}")
    return {name.replace(".", "/"): array for name, array in arrays.items()}

  def account(self, config: ModelConfig, plan: SharingPlan) -> Account:
    """See `Source.account`."""
    return account(self.shapes, config, plan, self.path, map(_by_our_name, entries(config)))

  def read(self, key: str, index: Index | None = None) -> np.ndarray:
    """See `Source.read`."""
    array = self._arrays[key]
    try:
      return (array if index is None else array[index]).read().result()
    except (OSError, ValueError) as error:
      raise UserError(f"{self.path / PARAMS} cannot be read: {key}: {_first(error)}") from None

  def parameter(self, entry: Entry, index: Index | None = None) -> np.ndarray:
    """See `Source.parameter`."""
    if entry.expert is None:
      return self.read(entry.key, index)
    number = entry.expert[0]
    if is_remote(self.path):  # there an array is read whole, so not again for every expert
      return self._held(entry.key)[number][() if index is None else index]
    return self.read(entry.key, (slice(number, number + 1), *(index or ())))[0]

  @functools.lru_cache(maxsize=1)  # noqa: B019 (one array, until the next is read)
  def _held(self, key: str) -> np.ndarray:
    return self.read(key)

  def tokenizer(self) -> Tokenizer:
    """See `Source.tokenizer`."""
    return read_tokenizer(self.path)

  def save_extras(self, folder: Path) -> None:
    """See `Source.save_extras`."""
    warn_of_tokenizer(self.path)
    copy_extras(self.path, folder)


def _by_our_name(entry: Entry) -> Entry:
  """The entry of a parameter that is stored as it is, experts together."""
  shape, experts = entry.our_shape(), entry.expert is not None
  whole = (0, shape[0], shape[0])
  return Entry("/".join(entry.path), entry.path, "... -> ...", shape, "", whole, {}, entry.expert, experts)


def _chunks(array: tensorstore.TensorStore) -> int:
  """The number of chunks of an array."""
  chunk: Sequence[int] = array.spec().to_json()["metadata"]["chunks"]
  return math.prod(-(-size // part) for size, part in zip(array.shape, chunk, strict=True))


def _first(error: Exception) -> str:
  """TensorStore's message without its source location."""
  return str(error).split(" [source locations=")[0].strip().split("\n")[0]
