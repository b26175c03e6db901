"""Tensor files: safetensors, and PyTorch's format. Tensors are memory-mapped, not read until used."""

from __future__ import annotations

import json
import mmap
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from sa_jax.errors import UserError
from sa_jax.files import is_remote, named
from sa_jax.storage import local_copy, outline, range_of

_TYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8, "U8": np.uint8,
  "I32": np.int32, "I64": np.int64,
}  # fmt: skip
_NAMES = {np.dtype(kind).name: name for name, kind in _TYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes of parameters; tensors of other dtypes are parts of quantised ones."""

_MOST_HEADER = 100_000_000
"""Maximum header size in bytes, the limit of safetensors."""


class Shard(Protocol):
  """A file of tensors.

  Attributes:
    suffix: the suffix of such files.
    path: the file.
    shapes: the shape of every tensor by name.
    dtypes: the dtype of every tensor by name, such as ``bfloat16``.
  """

  suffix: ClassVar[str]
  path: Path
  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, str]

  def __init__(self, path: Path): ...

  def read(self, key: str, rows: slice | None = None) -> np.ndarray:
    """A tensor in its stored dtype; it may be mapped from the file.

    With ``rows``, elements outside that slice of the first axis are undefined.
    """
    ...


def check_types(path: Path, dtypes: Mapping[str, str], allowed: Sequence[str]) -> None:
  """Checks that tensors have allowed dtypes.

  Raises:
    UserError: if they do not.
  """
  if wrong := [key for key, dtype in dtypes.items() if dtype not in allowed]:
    others = f" (and {len(wrong) - 1} others like it)" if len(wrong) > 1 else ""
    found, *needed = (_NAMES.get(dtype, dtype) for dtype in (dtypes[wrong[0]], *allowed))
    raise UserError(f"{wrong[0]} in {path} is {found}; must be one of {', '.join(needed)}{others}")


class SafetensorsFile:
  """A safetensors file. The package validates it; we read the tensors' offsets ourselves, to map them one by one."""

  suffix: ClassVar[str] = ".safetensors"

  def __init__(self, path: Path):
    from safetensors import SafetensorError, safe_open

    self.path = path
    try:
      with named(path), path.open("rb") as file:
        begin = file.read(8)
        size = int.from_bytes(begin, "little")
        text = file.read(min(size, _MOST_HEADER))
      with outline(path, begin + text) as whole, safe_open(str(whole), framework="numpy"):
        pass
      header: dict[str, Any] = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
      raise UserError(f"{path} is not a complete safetensors file: {error}") from None
    header.pop("__metadata__", None)
    check_types(path, {key: entry["dtype"] for key, entry in header.items()}, tuple(_TYPES))
    self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    self.dtypes = {key: np.dtype(_TYPES[entry["dtype"]]).name for key, entry in header.items()}
    self._offsets = {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}

  def read(self, key: str, rows: slice | None = None) -> np.ndarray:
    """See `Shard.read`."""
    shape, dtype, offset = self.shapes[key], np.dtype(self.dtypes[key]), self._offsets[key]
    count = int(np.prod(shape))
    if not count:
      return np.empty(shape, dtype)
    if is_remote(self.path):
      row = count * dtype.itemsize // (shape[0] if shape else 1)
      wanted = slice(0, count * dtype.itemsize) if rows is None else slice(rows.start * row, rows.stop * row)
      return range_of(self.path, offset, count * dtype.itemsize, wanted).view(dtype).reshape(shape)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with self.path.open("rb") as file:
      mapped = mmap.mmap(file.fileno(), offset - start + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, dtype, count, offset - start).reshape(shape)


class BinFile:
  """A ``pytorch_model.bin``. Only tensors are unpickled; files with other objects are rejected."""

  suffix: ClassVar[str] = ".bin"

  def __init__(self, path: Path):
    self.path = path
    self._file = local_copy(path)
    self._mapped = _can_be_mapped(self._file)
    tensors = self._load()
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
      raise UserError(f"{path} does not contain a dictionary from names to tensors")
    if wrong := [f"{key} is {what}" for key, tensor in tensors.items() if (what := _unreadable(tensor))]:
      raise UserError.of(f"{path} contains values that are not dense floating-point tensors", wrong[:20])
    self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    self.dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    self._held = None if self._mapped else tensors

  def _load(self) -> Any:
    try:
      import torch
    except ImportError:
      raise UserError(f"reading {self.path} needs PyTorch: pip install torch; safetensors files do not") from None
    import pickle

    try:
      return torch.load(self._file, map_location="cpu", weights_only=True, mmap=self._mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
      first = str(error).strip().split("\n")[0]
      raise UserError(f"{self.path} is not a complete PyTorch file of tensors only: {first}") from None

  def read(self, key: str, rows: slice | None = None) -> np.ndarray:
    """See `Shard.read`."""
    del rows
    import torch

    # The file is mapped again each time, so that memory touched by earlier tensors is released.
    tensor = (self._load() if self._held is None else self._held)[key].detach()
    if tensor.dtype == torch.bfloat16:
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _unreadable(tensor: Any) -> str:
  """What is stored instead of a dense floating-point tensor; empty if it is one."""
  if not hasattr(tensor, "layout"):
    return f"a {type(tensor).__name__}"
  if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.device.type != "cpu":
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    return f"a {kind} tensor" if tensor.device.type == "cpu" else f"a tensor without data, of device {tensor.device}"
  floats = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
  return "" if str(tensor.dtype) in floats else f"of type {str(tensor.dtype).removeprefix('torch.')}"


def _can_be_mapped(path: Path) -> bool:
  """Whether the file has PyTorch's archive format since 1.6, in which tensors can be mapped.

  Raises:
    UserError: if the archive is compressed: PyTorch would map the compressed bytes as numbers.
  """
  with path.open("rb") as file:
    if file.read(4) != b"PK\x03\x04":
      return False
  try:
    with zipfile.ZipFile(path) as archive:
      packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
  except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
    raise UserError(f"{path} is not a complete PyTorch file of tensors only: {error}") from None
  if packed:
    raise UserError(f"{path} is compressed ({packed[0]}, …); unpack it and save it again with torch.save")
  return True
