"""Quantised checkpoints: which tensors of a file form one parameter, and how to dequantise them."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sa_jax.errors import UserError
from sa_jax.formats.reader import Config

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble, lowest first
_UNUSED = re.compile(r".*\.(input_scale|activation_scale|output_scale|k_scale|v_scale|weight_format)")
"""Tensors for quantising activations at run time, which we do not do."""


class Stored(NamedTuple):
  """A tensor of a file.

  Attributes:
    shape: its shape.
    dtype: NumPy's name of its type.
  """

  shape: tuple[int, ...]
  dtype: str


class Recipe(NamedTuple):
  """How to make a tensor from others.

  Attributes:
    shape: its shape.
    parts: the names of the other tensors.
    dequantise: computes the tensor, float32, from them.
    by_row: whether each row along the first axis depends only on the same row of the parts.
  """

  shape: tuple[int, ...]
  parts: tuple[str, ...]
  dequantise: Callable[..., np.ndarray]
  by_row: bool = False


class Files(NamedTuple):
  """A quantised checkpoint.

  Attributes:
    stored: every tensor of its files.
    settings: its ``quantization_config``.
    read: reads a tensor.
  """

  stored: Mapping[str, Stored]
  settings: Config
  read: Callable[[str], np.ndarray]

  def beside(self, end: str, **others: str) -> Iterable[tuple[str, list[str]]]:
    """Tensors whose names have a suffix, without it, and the tensors with other suffixes, each with its dtype."""
    for name in self.stored:
      if not name.endswith(f".{end}"):
        continue
      base = name.removesuffix(f".{end}")
      names = [f"{base}.{other}" for other in others]
      for each, kind in zip(names, others.values(), strict=True):
        if each not in self.stored:
          raise UserError(f"{name} is quantised, but {each} is missing")
        self.check_kind(each, kind)
      yield base, names

  def matrix(self, name: str) -> tuple[int, int]:
    """The number of rows and columns of a tensor.

    Raises:
      UserError: if it is not a matrix.
    """
    shape = self.stored[name].shape
    if len(shape) != 2:
      raise UserError(f"{name} has shape {list(shape)}; must be a matrix")
    return shape[0], shape[1]

  def check_kind(self, name: str, kind: str, count: int | None = None) -> None:
    """Checks the dtype and, if given, the number of elements of a tensor.

    Raises:
      UserError: if they are different.
    """
    shape, dtype = self.stored[name]
    if not dtype.startswith(kind):
      raise UserError(f"{name} has dtype {dtype}; must be {kind}")
    if count is not None and math.prod(shape) != count:
      raise UserError(f"{name} has shape {list(shape)}; must have {count} elements")

  def check(self, name: str, *shapes: tuple[int, ...]) -> None:
    """Checks that a tensor has one of the shapes.

    Raises:
      UserError: if it does not.
    """
    if (shape := self.stored[name].shape) not in shapes:
      raise UserError(f"{name} has shape {list(shape)}, which does not match its other quantisation tensors")


def fault_of(settings: object) -> str | None:
  """Why a ``quantization_config`` is unsupported, or None if it is supported or absent."""
  if settings is None:
    return None
  method = _method(settings)
  if isinstance(settings, Mapping) and method in _METHODS:
    return _METHODS[method].fault(settings)
  return (
    f"the weights are quantised by {method or 'a method without a name'}, which is not read; "
    f"{', '.join(_METHODS)} are: open the original, or a GGUF file"
  )


def _method(settings: object) -> str:
  if not isinstance(settings, Mapping):
    return ""
  if settings.get("quant_method"):
    return str(settings["quant_method"])
  return "modelopt" if settings.get("quant_algo") else ""


def recipes(files: Files) -> tuple[dict[str, Recipe], set[str]]:
  """The quantised tensors, and the names of tensors that are only parts of them or not needed.

  Raises:
    UserError: if the parts of a tensor do not fit together.
  """
  found = dict(_METHODS[_method(files.settings)].find(files))
  used = {part for recipe in found.values() for part in recipe.parts}
  return found, (used - found.keys()) | {name for name in files.stored if _UNUSED.fullmatch(name)}


# FP8: each element times the scale of its tensor, row or block.


def _fp8(files: Files) -> Iterable[tuple[str, Recipe]]:
  high, wide = files.settings.get("weight_block_size") or (128, 128)
  for name, (shape, dtype) in files.stored.items():
    if not dtype.startswith("float8"):
      continue
    scale = next((each for each in (f"{name}_scale_inv", f"{name}_scale") if each in files.stored), None)
    if scale is None or len(shape) != 2:
      raise UserError(f"{name} {list(shape)} has dtype {dtype}, but is not a matrix with a {name}_scale")
    rows, columns = shape
    blocks = (-(-rows // high), -(-columns // wide))
    files.check_kind(scale, "float")
    files.check(scale, (), (1,), (1, 1), (rows,), (rows, 1), blocks)
    is_blocks = files.stored[scale].shape == blocks and blocks != (1, 1)
    yield name, Recipe(shape, (name, scale), functools.partial(_scaled, block=(high, wide) if is_blocks else None))


def _scaled(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int] | None) -> np.ndarray:
  scale = scale.astype(np.float32)
  if block is None:
    return weight.astype(np.float32) * scale.reshape(-1, 1)
  rows, columns = weight.shape
  return weight.astype(np.float32) * scale.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]


# AWQ and GPTQ: (x - zero) * scale, with 4-bit (or 8-bit) x, and zero and scale per group.


def _nibbles(packed: np.ndarray, bits: int = 4) -> np.ndarray:
  """int32 ``[..., n]`` → uint8 ``[..., n, 32 / bits]``, lowest bits first."""
  shifts = np.arange(0, 32, bits, dtype=np.uint32)
  return ((packed.view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)


def _awq_columns(packed: np.ndarray) -> np.ndarray:
  out = np.empty((*packed.shape, 8), np.float32)
  out[..., list(_AWQ_ORDER)] = _nibbles(packed)
  return out.reshape(len(packed), -1)


def _awq_weight(weight: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
  group = len(weight) // len(scales)
  zeros, scales = (np.repeat(each, group, 0) for each in (_awq_columns(zeros), scales.astype(np.float32)))
  return ((_awq_columns(weight) - zeros) * scales).T


def _awq(files: Files) -> Iterable[tuple[str, Recipe]]:
  for base, names in files.beside("qweight", qweight="int32", qzeros="int32", scales="float"):
    (inputs, packed), (groups, _) = (files.matrix(names[each]) for each in (0, 2))
    files.check(names[1], (groups, packed))
    files.check(names[2], (groups, packed * 8))
    if inputs % groups:
      raise UserError(f"{names[0]} has {inputs} rows, which cannot be divided into {groups} groups")
    yield f"{base}.weight", Recipe((packed * 8, inputs), tuple(names), _awq_weight)


def _gptq(files: Files) -> Iterable[tuple[str, Recipe]]:
  bits = int(files.settings.get("bits", 4))
  above = 0 if _gptq_format(files.settings) == "gptq_v2" else 1
  for base, names in files.beside("qweight", qweight="int32", qzeros="int32", scales="float", g_idx="int"):
    (packed, outputs), (groups, _) = (files.matrix(names[each]) for each in (0, 2))
    inputs = packed * 32 // bits
    files.check(names[1], (groups, outputs * bits // 32))
    files.check(names[2], (groups, outputs))
    files.check(names[3], (inputs,))
    yield f"{base}.weight", Recipe((outputs, inputs), tuple(names), functools.partial(_gptq_weight, bits, above))


def _gptq_weight(
  bits: int, above: int, packed: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray
) -> np.ndarray:
  if groups.min() < 0 or groups.max() >= len(scales):
    raise UserError(f"g_idx contains group {groups.max()}, but there are only {len(scales)} groups")
  numbers = _nibbles(packed, bits).swapaxes(1, 2).reshape(-1, packed.shape[1]).astype(np.float32)
  low = _nibbles(zeros, bits).reshape(len(zeros), -1).astype(np.float32) + above
  return ((numbers - low[groups]) * scales.astype(np.float32)[groups]).T


# bitsandbytes: 8 bits times a scale per row; or 4-bit codebook indices, times a scale per block.


def _bitsandbytes(files: Files) -> Iterable[tuple[str, Recipe]]:
  for base, names in files.beside("SCB", weight="int8", SCB="float"):
    shape = files.matrix(names[0])
    files.check(names[1], (shape[0],))
    yield f"{base}.weight", Recipe(shape, tuple(names), _bytes)
  for name in files.stored:
    if match := re.fullmatch(r"(.*\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)", name):
      yield match[1], _four_bits(files, match[1], name)


def _bytes(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  return weight.astype(np.float32) * (scale.astype(np.float32)[:, None] / np.float32(127))


class _State(NamedTuple):
  """The description of a 4-bit tensor in a file: its shape, and the layout of its scales."""

  shape: tuple[int, ...]
  block: int
  outer_block: int
  offset: float


def _four_bits(files: Files, name: str, described: str) -> Recipe:
  outer = [f"{name}.{each}" for each in ("nested_absmax", "nested_quant_map")]
  parts = [name, f"{name}.absmax", f"{name}.quant_map", *(outer if outer[0] in files.stored else [])]
  if missing := [part for part in parts if part not in files.stored]:
    raise UserError(f"{name} is quantised, but {missing[0]} is missing")
  try:
    said = json.loads(files.read(described).tobytes())
    state = _State(
      tuple(map(int, said["shape"])),
      int(said["blocksize"]),
      int(said.get("nested_blocksize", 1)),
      float(said.get("nested_offset", 0)),
    )
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{described} does not describe a 4-bit tensor: {error!r}") from None
  numbers = math.prod(state.shape)
  if math.prod(files.stored[name].shape) * 2 != numbers or min(state.block, state.outer_block, *state.shape) < 1:
    raise UserError(
      f"{described} gives {name} the shape {list(state.shape)}, which does not match its number of elements"
    )
  blocks = -(-numbers // state.block)
  needed = [("uint8", numbers // 2), ("uint8" if len(parts) > 3 else "float", blocks), ("float", 16)]
  for part, (kind, count) in zip(parts, [*needed, ("float", -(-blocks // state.outer_block)), ("float", 256)]):
    files.check_kind(part, kind, count)
  # The description is also a part, but nothing more of it is needed.
  return Recipe(state.shape, (*parts, described), functools.partial(_of_blocks, state))


def _of_blocks(
  state: _State, packed: np.ndarray, most: np.ndarray, values: np.ndarray, *others: np.ndarray
) -> np.ndarray:
  if len(others) > 1:
    most = others[1][most.reshape(-1)] * np.repeat(others[0], state.outer_block)[: most.size] + state.offset
  packed = packed.reshape(-1)
  numbers = values.astype(np.float32)[np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)]
  return (numbers * np.repeat(most.astype(np.float32).reshape(-1), state.block)[: numbers.size]).reshape(state.shape)


# MXFP4 (Open Compute Project, Microscaling Formats 1.0, sections 5.1 and 5.4): 4-bit codebook indices, times a power
# of two per block.

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP4_PAIRS = np.stack(np.broadcast_arrays(_FP4[None, :], _FP4[:, None]), axis=-1).reshape(256, 2)  # lower nibble first
_POWERS = np.append(np.exp2(np.arange(255, dtype=np.float32) - 127), np.float32("nan"))


def _mxfp4(files: Files) -> Iterable[tuple[str, Recipe]]:
  for name in files.stored:
    if not name.endswith("_blocks"):
      continue
    base = name.removesuffix("_blocks")
    scales = f"{base}_scales"
    if scales not in files.stored:
      raise UserError(f"{name} is quantised, but {scales} is missing")
    for each in (name, scales):
      if files.stored[each].dtype != "uint8":
        raise UserError(f"{each} has dtype {files.stored[each].dtype}; must be uint8")
    shape = files.stored[name].shape
    if len(shape) != 4:
      raise UserError(f"{name} has shape {list(shape)}; must be [experts, outputs, blocks, bytes]")
    files.check(scales, shape[:3])
    experts, outputs, blocks, size = shape
    yield base, Recipe((experts, blocks * size * 2, outputs), (name, scales), _of_powers, by_row=True)


def _of_powers(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
  numbers = _FP4_PAIRS[packed].reshape(*scales.shape, -1)
  numbers *= _POWERS[scales][..., None]
  return numbers.reshape(*scales.shape[:2], -1).swapaxes(1, 2)


class _Method(NamedTuple):
  find: Callable[[Files], Iterable[tuple[str, Recipe]]]
  fault: Callable[[Config], str | None] = lambda settings: None


def _only(key: str, values: Sequence[object], default: object) -> Callable[[Config], str | None]:
  def fault(settings: Config) -> str | None:
    value = settings.get(key, default)
    return None if value in values else f"{key} is {value!r}; must be {' or '.join(map(repr, values))}"

  return fault


def _awq_fault(settings: Config) -> str | None:
  return _only("bits", (4,), 4)(settings) or _only("version", ("gemm", "GEMM"), "gemm")(settings)


def _gptq_format(settings: Config) -> object:
  return settings.get("checkpoint_format", settings.get("format", "gptq"))


def _gptq_fault(settings: Config) -> str | None:
  written = {"checkpoint_format": _gptq_format(settings)}
  return _only("bits", (4, 8), 4)(settings) or _only("checkpoint_format", ("gptq", "gptq_v2"), "gptq")(written)


def _compressed_fault(settings: Config) -> str | None:
  if settings.get("transform_config"):
    return "transform_config, which rotates activations between layers, is not implemented"
  return _only("format", ("float-quantized", "naive-quantized"), None)(settings) or _fp8_fault(settings)


def _modelopt_fault(settings: Config) -> str | None:
  return _only("quant_algo", ("FP8",), None)(settings) or _fp8_fault(settings)


def _fp8_fault(settings: Config) -> str | None:
  block = settings.get("weight_block_size")
  is_size = lambda size: isinstance(size, int) and size > 0
  if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(is_size, block))):
    return f"weight_block_size is {block!r}; must be two numbers"
  return None


_METHODS: dict[str, _Method] = {
  "fp8": _Method(_fp8, _fp8_fault),
  "fbgemm_fp8": _Method(_fp8, _fp8_fault),
  "compressed-tensors": _Method(_fp8, _compressed_fault),
  "modelopt": _Method(_fp8, _modelopt_fault),
  "awq": _Method(_awq, _awq_fault),
  "gptq": _Method(_gptq, _gptq_fault),
  "bitsandbytes": _Method(_bitsandbytes),
  "mxfp4": _Method(_mxfp4),
}
"""By ``quant_method``."""
