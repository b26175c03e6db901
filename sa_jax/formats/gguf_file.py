"""GGUF files, in one part or several, under Hugging Face's names."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.gguf_architectures import GgufArchitecture
from sa_jax.formats.gguf_config import ROPE_FACTORS, Values, architecture_of, config_of
from sa_jax.formats.table import Account, Entry, Index, account
from sa_jax.formats.tokenizer import Tokenizer
from sa_jax.plan import SharingPlan
from sa_jax.storage import local_copy

if TYPE_CHECKING:
  import gguf

_LOG = logging.getLogger("sa_jax")

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_ONE_ROW = "shared_expert_gate.weight"
_CHUNK = 1 << 16
"""Elements dequantised per chunk, so that intermediate results fit in the CPU cache."""


class GgufFile:
  """A GGUF file, or the first of several; quantised tensors are dequantised to float32 when read."""

  def __init__(self, path: Path):
    try:
      import gguf
    except ImportError as error:
      raise UserError(f"reading {path} needs the gguf package ({error}): pip install 'sa-jax[gguf]'") from None
    self._quants = gguf.quants
    readers = _open_parts(path)
    self.path = path
    self._values = Values(path, readers[0].fields)
    architecture = architecture_of(self._values)
    self._architecture = architecture
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    self._check_types(stored)
    factors = {name: self._dequantized(stored.pop(name)).reshape(-1) for name in ROPE_FACTORS if name in stored}
    self.config = config_of(self._values, {name: _shape(tensor) for name, tensor in stored.items()}, factors)
    self._parts = _named(stored, architecture)
    self.shapes = {
      key: (sum(_shape(part)[0] for part in parts), *_shape(parts[0])[1:]) for key, parts in self._parts.items()
    }

  def field(self, name: str, kind: type, default: Any = None) -> Any:
    """A metadata value; see `Values.take`."""
    return self._values.take(name, kind, default)

  def optional(self, name: str, kind: type = object) -> Any:
    """A metadata value, or None; see `Values.optional`."""
    return self._values.optional(name, kind)

  def _check_types(self, stored: dict[str, gguf.ReaderTensor]) -> None:
    """Checks that every tensor can be dequantised, by dequantising one block of each type."""
    import gguf

    faults = []
    for kind in {tensor.tensor_type for tensor in stored.values()} - {gguf.GGMLQuantizationType.F64}:
      try:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        with np.errstate(all="ignore"):
          self._quants.dequantize(block, kind)  # also creates the tables that some types need
      except NotImplementedError:
        names = sorted(tensor.name for tensor in stored.values() if tensor.tensor_type == kind)
        faults.append(
          f"{names[0]} (and {len(names) - 1} others) is {kind.name}, which the gguf package cannot dequantise"
        )
    if faults:
      raise UserError.of(f"{self.path} cannot be read", sorted(faults))

  @property
  def dtypes(self) -> dict[str, str]:
    """See `Source.dtypes`."""
    return {key: parts[0].tensor_type.name for key, parts in self._parts.items()}

  def account(self, config: ModelConfig, plan: SharingPlan) -> Account:
    """See `Source.account`."""
    return account(self.shapes, config, plan, self.path)

  def read(self, key: str) -> np.ndarray:
    """See `Source.read`."""
    parts = self._parts[key]
    out = np.empty(self.shapes[key], np.float32)
    start = 0
    for part in parts:
      rows = _shape(part)[0]
      self._dequantized(part, out[start : start + rows])
      start += rows
    if self._architecture.norm_offset and key.endswith("norm.weight"):
      out -= np.float32(self._architecture.norm_offset)
    return out

  def _dequantized(self, tensor: gguf.ReaderTensor, out: np.ndarray | None = None) -> np.ndarray:
    """A tensor's elements, in chunks of rows."""
    out = np.empty(_shape(tensor), np.float32) if out is None else out
    data = self._in_their_order(tensor)
    data = data if data.ndim > 1 else data[None]
    rows = out.reshape(len(data), -1)
    step = max(1, _CHUNK // max(rows.shape[-1], 1))
    for start in range(0, len(data), step):
      chunk = data[start : start + step]
      if chunk.dtype in (np.float64, np.float32, np.float16):
        rows[start : start + step] = chunk
      else:
        # Equivalent to the package's `dequantize`, which uses 16 rows at a time and is three times slower.
        rows[start : start + step] = getattr(self._quants, tensor.tensor_type.name).dequantize_rows(chunk)
    return out

  def _in_their_order(self, tensor: gguf.ReaderTensor) -> np.ndarray:
    """The file's bytes, with rows in the order of Hugging Face's code."""
    match = _BLOCK.fullmatch(tensor.name)
    block = match[2] if match else ""
    if self._architecture.swapped and block in ("attn_q", "attn_k"):
      heads = self.config["num_attention_heads" if block == "attn_q" else "num_key_value_heads"]
      # Each head's rows go from adjacent pairs to halves.
      return tensor.data.reshape(heads, -1, 2, *tensor.data.shape[1:]).swapaxes(1, 2).reshape(tensor.data.shape)
    if self._architecture.grouped and block == "attn_qkv":
      heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
      by_head = np.arange(len(tensor.data)).reshape(heads + 2 * groups, -1)
      query, key, value = np.split(by_head, [heads, heads + groups])
      parts = (query.reshape(groups, heads // groups, -1), key[:, None], value[:, None])
      return tensor.data[np.concatenate(parts, axis=1).reshape(-1)]
    return tensor.data

  def parameter(self, entry: Entry, index: Index | None = None) -> np.ndarray:
    """See `Source.parameter`."""
    return entry.part_of(self.read(entry.key), index)

  def tokenizer(self) -> Tokenizer:
    """See `Source.tokenizer`."""
    from sa_jax.formats.gguf_tokenizer import from_gguf

    return from_gguf(self)

  def save_extras(self, folder: Path) -> None:
    """See `Source.save_extras`."""
    from sa_jax.formats.gguf_tokenizer import from_gguf, unsupported

    if self.optional("tokenizer.ggml.model") is None:
      return
    if reason := unsupported(self):
      _LOG.warning("%s: the checkpoint has none", reason)
    else:
      from_gguf(self).save(folder)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
  return tuple(int(size) for size in reversed(tensor.shape))


def _along_first(tensor: gguf.ReaderTensor) -> list[gguf.ReaderTensor]:
  """The slices along a tensor's first axis (the last in GGUF's shape)."""
  return [tensor._replace(data=part, shape=tensor.shape[:-1]) for part in tensor.data]


def _open_parts(path: Path) -> list[gguf.GGUFReader]:
  """The file, or all parts if it is the first of several.

  Raises:
    UserError: if a file is incomplete, is not the first part, or a part is missing or from another model.
  """
  first = _open(path)
  field = first.fields.get("split.count")
  count = 1 if field is None else int(field.contents())
  if count <= 1:
    return [first]
  match = _SPLIT.fullmatch(path.name)
  if match is None or int(match[3]) != count:
    raise UserError(f"{path} is one of {count} parts, and should be named NAME-00001-of-{count:05}.gguf")
  paths = [path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
  if int(match[2]) != 1:
    raise UserError(f"{path} is one of {count} parts; open the first, {paths[0].name}")
  if missing := [each.name for each in paths if not each.is_file()]:
    raise UserError(f"parts are missing from {path.parent}: {', '.join(missing)}")
  readers = [first, *(_open(each) for each in paths[1:])]
  for number, (each, reader) in enumerate(zip(paths, readers, strict=True)):
    said = [reader.fields[name].contents() for name in ("split.no", "split.count") if name in reader.fields]
    if said != [number, count]:
      raise UserError(f"{each} says that it is part {said}, not {[number, count]}")
  return readers


def _open(path: Path) -> gguf.GGUFReader:
  try:
    local = local_copy(path)
    found = local.stat()
    return _reader(local, found.st_ino, found.st_size, found.st_mtime_ns)
  except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, OverflowError) as error:
    raise UserError(f"{path} is not a whole GGUF file: {error}") from None


@functools.lru_cache(maxsize=1)
def _reader(path: Path, *_state: int) -> gguf.GGUFReader:
  """Cached, because a command opens its model twice, for the tokenizer and for the weights."""
  from sa_jax.formats.gguf_reader import QuickReader

  return QuickReader(path)


def _named(
  stored: dict[str, gguf.ReaderTensor], architecture: GgufArchitecture
) -> dict[str, tuple[gguf.ReaderTensor, ...]]:
  """Maps Hugging Face's tensor names to the file's tensors; unknown names are kept, for the account to report."""
  whole = {part: (name, parts) for name, parts in architecture.packed.items() for part in parts}
  named: dict[str, tuple[gguf.ReaderTensor, ...]] = {}
  blocks = dict(architecture.blocks)
  for present, others in architecture.variants.items():
    blocks |= others if f"blk.0.{present}.weight" in stored else {}
  for name, tensor in stored.items():
    match = _BLOCK.fullmatch(name)
    if match is None:
      outer, _, kind = name.rpartition(".")
      named[f"{architecture.outer[outer]}.{kind}" if outer in architecture.outer else name] = (tensor,)
      continue
    layer, block, kind = match.groups()
    packed, parts = whole.get(block, ("", ()))
    beside = [stored.get(f"blk.{layer}.{part}.{kind}") for part in parts]
    if packed and all(each is not None for each in beside):
      named[f"{architecture.layers}.{layer}.{packed}.{kind}"] = tuple(each for each in beside if each is not None)
    elif block in blocks and "{expert}" in blocks[block]:
      for number, expert in enumerate(_along_first(tensor)):
        own = blocks[block].format(expert=number)
        named[f"{architecture.layers}.{layer}.{own}.{kind}"] = (expert,)
    elif block in blocks:
      named[f"{architecture.layers}.{layer}.{blocks[block]}.{kind}"] = (tensor,)
    else:
      named[name] = (tensor,)
  return {key: tuple(map(_as_matrix, parts)) if key.endswith(_ONE_ROW) else parts for key, parts in named.items()}


def _as_matrix(tensor: gguf.ReaderTensor) -> gguf.ReaderTensor:
  """Turns a vector into the one-row matrix of Hugging Face's files."""
  return tensor if len(tensor.shape) > 1 else tensor._replace(data=tensor.data[None], shape=np.append(tensor.shape, 1))
