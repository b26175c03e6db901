"""Files of tensors: safetensors, and PyTorch's own format. Tensors are mapped into memory, not read, until used."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np

from sa_jax.errors import UserError

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Shard(Protocol):
  """A file of tensors.

  Attributes:
    suffix: of such files' names.
    path: the file.
    shapes: every tensor's name and shape.
    dtypes: every tensor's name and type, such as ``bfloat16``.
  """

  suffix: ClassVar[str]
  path: Path
  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, str]

  def __init__(self, path: Path): ...

  def read(self, key: str) -> np.ndarray:
    """One tensor, in its stored dtype; its memory is the file's and goes with the array."""
    ...


class SafetensorsFile:
  """A safetensors file. The package validates it; where its tensors lie we read ourselves, to map one at a time."""

  suffix: ClassVar[str] = ".safetensors"

  def __init__(self, path: Path):
    from safetensors import SafetensorError, safe_open

    self.path = path
    try:
      with safe_open(str(path), framework="numpy"):
        pass
      with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
      raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    if wrong := [key for key, entry in header.items() if entry["dtype"] not in _FLOATS]:
      key = wrong[0]
      others = f" (and {len(wrong) - 1} others like it)" if len(wrong) > 1 else ""
      raise UserError(f"{key} in {path} is {header[key]['dtype']}; one of {', '.join(_FLOATS)} is needed{others}")
    self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    self.dtypes = {key: np.dtype(_FLOATS[entry["dtype"]]).name for key, entry in header.items()}
    self._offsets = {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}

  def read(self, key: str) -> np.ndarray:
    """See `Shard.read`."""
    shape, dtype, offset = self.shapes[key], np.dtype(self.dtypes[key]), self._offsets[key]
    count = int(np.prod(shape))
    if not count:
      return np.empty(shape, dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with self.path.open("rb") as file:
      mapped = mmap.mmap(file.fileno(), offset - start + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, dtype, count, offset - start).reshape(shape)


class BinFile:
  """A ``pytorch_model.bin``. Only its tensors are unpickled; a file that wants more is refused."""

  suffix: ClassVar[str] = ".bin"

  def __init__(self, path: Path):
    self.path = path
    tensors = self._load()
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
      raise UserError(f"{path} does not hold a dictionary from names to tensors")
    floats = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
    if wrong := [key for key, tensor in tensors.items() if str(getattr(tensor, "dtype", None)) not in floats]:
      raise UserError(f"{path} holds other things than tensors of floating-point numbers: {wrong[:20]}")
    self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    self.dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}

  def _load(self) -> Any:
    try:
      import torch
    except ImportError:
      raise UserError(f"reading {self.path} needs PyTorch: pip install torch; safetensors files do not") from None
    import pickle

    try:
      return torch.load(self.path, map_location="cpu", weights_only=True, mmap=_is_zip(self.path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
      first = str(error).strip().split("\n")[0]
      raise UserError(f"{self.path} is not a whole file of PyTorch tensors and nothing else: {first}") from None

  def read(self, key: str) -> np.ndarray:
    """See `Shard.read`."""
    import torch

    tensor = self._load()[key].detach()  # opened anew: memory touched by earlier tensors is given back
    if tensor.dtype == torch.bfloat16:
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _is_zip(path: Path) -> bool:
  """Whether the file is in PyTorch's format since 1.6, which can be mapped."""
  with path.open("rb") as file:
    return file.read(4) == b"PK\x03\x04"
