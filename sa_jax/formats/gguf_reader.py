"""The gguf package's reader with fast array metadata: a vocabulary has a hundred thousand strings."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField


class _Strings(ReaderField):
  """A field of strings; its last part is the list of them."""

  def contents(self, index_or_slice: int | slice = slice(None)) -> Any:
    return self.parts[-1][index_or_slice]


class QuickReader(GGUFReader):
  """`gguf.GGUFReader` with the same field contents; reads SmolLM2's metadata in a tenth of the time.

  Strings are not separate parts of their field: its last part is the list of them.
  """

  def _push_field(self, field: ReaderField, skip_sum: bool = False) -> int:
    if field.types == [GGUFValueType.ARRAY, GGUFValueType.STRING]:
      field = _Strings(*field)
    return super()._push_field(field, skip_sum)

  def _get_field_parts(
    self, orig_offs: int, raw_type: int
  ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
    if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
      return super()._get_field_parts(orig_offs, raw_type)
    data = self.data.view(np.ndarray)
    raw_kind, raw_count = data[orig_offs : orig_offs + 4], data[orig_offs + 4 : orig_offs + 12]
    if len(raw_count) < 8:
      raise ValueError("it ends within its metadata")
    kind, count, begin = GGUFValueType(_number(raw_kind)), _number(raw_count), orig_offs + 12
    head = [raw_kind.view(np.uint32), raw_count.view(np.uint64)]
    types = [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]
    if kind == GGUFValueType.STRING:
      end, strings = _strings(data, begin, count)
      return end - orig_offs, [*head, strings], [len(head)] if count else [], types
    if kind not in self.gguf_scalar_to_np:  # an array of arrays
      return super()._get_field_parts(orig_offs, raw_type)
    dtype = np.dtype(self.gguf_scalar_to_np[kind])
    end = begin + count * dtype.itemsize
    if end > len(data):
      raise ValueError("it ends within its metadata")
    numbers = data[begin:end].view(dtype)
    return end - orig_offs, [*head, numbers], [len(head)] if count else [], types


def _strings(data: np.ndarray, at: int, count: int) -> tuple[int, list[str]]:
  """The end offset of consecutive strings, and the strings."""
  bytes_of = data.data
  found = []
  for _ in range(count):
    begin = at + 8
    at = begin + int.from_bytes(bytes_of[at:begin], "little")
    if at > len(data):
      raise ValueError("it ends within its metadata")
    found.append(str(bytes_of[begin:at], "utf-8"))
  return at, found


def _number(data: np.ndarray) -> int:
  return int.from_bytes(data.tobytes(), "little")
