"""Lazy parameters, and how they get to devices: in slices, in the requested dtype."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sa_jax import machine
from sa_jax.display import Progress
from sa_jax.errors import UserError
from sa_jax.formats.source import Source
from sa_jax.formats.table import Entry, Index
from sa_jax.trees import Params, Tree

_LOG = logging.getLogger("sa_jax")
_CACHE_LINE = 64
_NAMED = 5  # maximum number of names in a warning


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
  """A parameter that has not been read yet, or a stack of several layers' parameters.

  Attributes:
    readers: one, or one per layer, or per expert and layer, in the order of the leading axes; each reads or maps the
      array or a slice of it.
    layer_shape: the shape without the leading axes.
    leading: sizes of the leading axes: layers, then experts; empty if there are none.
    dtype: the requested dtype.
    names: the file's name of each reader's tensor.
  """

  readers: tuple[Callable[[Index | None], np.ndarray], ...]
  layer_shape: tuple[int, ...]
  leading: tuple[int, ...]
  dtype: np.dtype
  names: tuple[str, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """The parameter's shape."""
    return (*self.leading, *self.layer_shape)

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Its bytes in the requested dtype."""
    return self.size * self.dtype.itemsize

  def read(self, layer: int = 0, index: Index | None = None) -> np.ndarray:
    """One layer's tensor, or a slice of it; of a mapped file only the slice is read."""
    return self.readers[layer](index).astype(self.dtype, copy=False)

  def read_whole(self) -> np.ndarray:
    """The whole parameter."""
    if not self.leading:
      return self.read()
    whole = np.empty((len(self.readers), *self.layer_shape), self.dtype)
    for number in range(len(self.readers)):
      whole[number] = contiguous(self.read(number))
    return whole.reshape(self.shape)

  def read_owned(self, layer: int, index: Index | None) -> np.ndarray:
    """Like `read`, but safe to keep: JAX cannot alias it while it is still backed by the file."""
    part = self.read(layer, index)
    return part if part.flags.owndata or not part.flags.c_contiguous else _copy(part)

  def stacked(self, others: Sequence[LazyTensor], leading: tuple[int, ...]) -> LazyTensor:
    """The stack of this tensor and others of the same shape."""
    readers = tuple(reader for tensor in (self, *others) for reader in tensor.readers)
    names = tuple(name for tensor in (self, *others) for name in tensor.names)
    return dataclasses.replace(self, readers=readers, names=names, leading=(*leading, *self.leading))


def _copy(array: np.ndarray) -> np.ndarray:
  """A copy that JAX can alias on a CPU; it would copy again if the start were not aligned to a cache line."""
  room = np.empty(array.nbytes + _CACHE_LINE, np.uint8)
  start = -room.ctypes.data % _CACHE_LINE
  out = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
  np.copyto(out, array)
  return out


def lazy_tree(source: Source, used: Sequence[Entry], dtype: str) -> dict[str, Tree]:
  """The parameters in the layer layout, unread.

  Raises:
    UserError: if a single tensor is larger than host memory.
  """
  _check_memory(used)
  tree: dict[str, Tree] = {}
  parts: dict[tuple[str, ...], list[Entry]] = {}
  for entry in used:
    parts.setdefault(entry.path, []).append(entry)
  for (*parents, leaf), found in parts.items():
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    readers = tuple(functools.partial(source.parameter, entry) for entry in found)
    leading = () if found[0].expert is None else (len(found),)
    node[leaf] = LazyTensor(
      readers, found[0].our_shape(), leading, jnp.dtype(dtype), tuple(entry.key for entry in found)
    )
  return tree


def _check_memory(used: Sequence[Entry]) -> None:
  largest = max(used, key=lambda entry: math.prod(entry.shape), default=None)
  have = machine.memory()
  if largest is None or have is None or (needed := 2 * math.prod(largest.shape)) <= have:
    return
  raise UserError(
    f"{largest.key} {largest.shape} takes at least {needed / 1e9:,.1f} GB, but this machine has {have / 1e9:,.1f}: the "
    "file is damaged, or needs a machine with more memory"
  )


def stack_lazily(leaves: Sequence[LazyTensor], leading: tuple[int, ...]) -> LazyTensor:
  """The stacking function for `sa_jax.params.stack`."""
  return leaves[0].stacked(leaves[1:], leading)


def place(tree: Params, shardings: Tree, progress: Progress | None) -> dict[str, Tree]:
  """Reads every parameter onto its devices, one layer at a time; each device reads only its slice.

  Tensors with NaN or infinite elements are listed in a warning, because the model's output would be NaN.

  Args:
    tree: a tree of `LazyTensor`.
    shardings: a tree like it, or one sharding for all.
    progress: called with (tensors placed, total tensors).
  """
  leaves, structure = jax.tree.flatten(tree)
  each = [shardings] * len(leaves) if isinstance(shardings, Sharding) else jax.tree.leaves(shardings)
  placed: list[jax.Array | None] = [None] * len(leaves)
  wrong: dict[str, None] = {}
  done, total = 0, sum(len(leaf.readers) for leaf in leaves)
  # Largest first, so that little memory is in flight when most is placed.
  for number in sorted(range(len(leaves)), key=lambda number: -leaves[number].nbytes):
    leaf, sharding = leaves[number], each[number]
    array = None
    for layer in range(len(leaf.readers)):
      piece = _put(leaf, layer, _of_layer(sharding, len(leaf.leading)))
      # Read at once: XLA's CPU backend deadlocks when more than 32 collectives, which this is on a mesh, are in flight.
      if not _is_finite(piece):
        wrong[leaf.names[layer]] = None  # once, though a tensor of the file may contain several parameters
      if not leaf.leading:
        array = piece
      else:
        array = _empty(leaf.shape, leaf.dtype, sharding) if array is None else array
        array = _insert(array, piece, tuple(np.int32(i) for i in np.unravel_index(layer, leaf.leading)))
      array.block_until_ready()  # so that at most one tensor is in flight
      done += 1
      if progress is not None:
        progress(done, total)
    placed[number] = array
  if wrong:
    others = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    _LOG.warning("NaN or infinite numbers in %s%s", ", ".join(list(wrong)[:_NAMED]), others)
  return jax.tree.unflatten(structure, placed)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()


def _put(leaf: LazyTensor, layer: int, sharding: Sharding) -> jax.Array:
  # Layers of a stack are copied into it, so they may alias the file's memory.
  read = leaf.read if leaf.leading else leaf.read_owned
  parts: dict[str, np.ndarray] = {}  # devices that hold the same slice read it only once

  def part(index: Index | None) -> np.ndarray:
    if (name := str(index)) not in parts:
      parts[name] = read(layer, index)
    return parts[name]

  return jax.make_array_from_callback(leaf.layer_shape, sharding, part)


def _of_layer(sharding: Sharding, leading: int) -> Sharding:
  """The sharding of one layer of a stack."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[leading:]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, sharding: Sharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, layer: jax.Array, position: tuple[jax.Array, ...]) -> jax.Array:
  # As integers: XLA's CPU backend copies 16-bit floats through float32 one by one, eight times slower.
  kind = jnp.uint16 if stack.dtype.itemsize == 2 else stack.dtype
  as_kind = lambda x: jax.lax.bitcast_convert_type(x, kind)
  start: tuple[Any, ...] = (*position, *[0] * layer.ndim)
  layer = jnp.expand_dims(as_kind(layer), tuple(range(len(position))))
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(as_kind(stack), layer, start), stack.dtype)


def contiguous(array: np.ndarray) -> np.ndarray:
  """The array in C order; JAX's copy is several times faster than NumPy's."""
  if array.flags.c_contiguous:
    return array
  return np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))
