"""Jitted functions that can also be compiled ahead of time for other devices.

The library jits functions with `program` and transfers results to the host with `fetch`. A public function can
therefore be called with shapes instead of parameters: under `compiling`, every program that it would run is compiled
for the mesh of those shapes, and nothing runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.trees import Tree

T = TypeVar("T")


class Compiled(NamedTuple):
  """A program that was compiled but not run.

  Attributes:
    name: the function's name.
    executable: the compiled executable.
  """

  name: str
  executable: jax.stages.Compiled


_compiled: contextvars.ContextVar[dict[Hashable, Compiled] | None] = contextvars.ContextVar("compiled", default=None)


class Program(Generic[T]):
  """A function jitted by `program`.

  Attributes:
    name: the function's name.
    jitted: the result of `jax.jit`.
  """

  def __init__(self, function: Callable[..., T], jitted: jax.stages.Wrapped) -> None:
    functools.update_wrapper(self, function)
    self.name, self.jitted = function.__name__, jitted

  def __get__(self, instance: object, owner: type | None = None) -> Callable[..., T]:
    """Binds the program as a method, with ``self`` as the first argument."""
    return self if instance is None else functools.partial(self, instance)

  def __call__(self, *arguments: Any, **named: Any) -> T:
    """Runs the program; under `compiling`, if any argument is a shape, compiles it and returns shapes."""
    compiled = _compiled.get()
    if compiled is None or not any(map(_is_shape, jax.tree.leaves((arguments, named)))):
      return self.jitted(*arguments, **named)
    # Local arrays become shapes without a sharding.
    arguments, named = jax.tree.map(_shape_of, (arguments, named))
    leaves, structure = jax.tree.flatten((arguments, named))
    key = (self.jitted, structure, jax.sharding.get_abstract_mesh(), *leaves)
    if key not in compiled:
      compiled[key] = Compiled(self.name, self.jitted.lower(*arguments, **named).compile())
    executable = compiled[key].executable
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), executable.out_info
    )


def program(**options: Any) -> Callable[[Callable[..., T]], Program[T]]:
  """`jax.jit` with its options, for the library's own functions."""
  return lambda function: Program(function, jax.jit(function, **options))


@contextlib.contextmanager
def compiling() -> Iterator[Collection[Compiled]]:
  """Makes programs that are called with shapes compile instead of run; yields a live view of what they compiled.

  The shardings of the shapes determine the devices. Inside, `fetch` returns ones for shapes, so the results of public
  functions are meaningless.
  """
  compiled: dict[Hashable, Compiled] = {}
  token = _compiled.set(compiled)
  try:
    yield compiled.values()
  finally:
    _compiled.reset(token)


def fetch(tree: Tree) -> Tree:
  """Transfers arrays to the host as NumPy arrays, complete and equal on every process.

  Arrays that are sharded over several processes are gathered first, so all processes must make the same call.
  """
  leaves, structure = jax.tree.flatten(tree)
  apart = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not _is_here(leaf)]
  whole = iter(_replicated(_mesh(apart[0]))(apart) if apart else ())
  leaves = [next(whole) if isinstance(leaf, jax.Array) and not _is_here(leaf) else leaf for leaf in leaves]
  if _compiled.get() is not None:
    leaves = [np.ones(leaf.shape, leaf.dtype) if _is_shape(leaf) else leaf for leaf in leaves]
  return jax.device_get(jax.tree.unflatten(structure, leaves))


def fetch_each(results: Iterable[Tree]) -> Iterator[Tree]:
  """`fetch` for results that are made one after another.

  Each is fetched after the next has been dispatched, so that devices compute while the host prepares the next one.
  """
  waiting: list[Tree] = []
  for result in results:
    waiting.append(result)
    if len(waiting) > 1:
      yield fetch(waiting.pop(0))
  yield from map(fetch, waiting)


def _is_here(array: jax.Array) -> bool:
  """Whether this process can read the whole array."""
  return array.is_fully_addressable or array.is_fully_replicated


def _mesh(array: jax.Array) -> Mesh:
  assert isinstance(array.sharding, NamedSharding), array.sharding
  assert isinstance(array.sharding.mesh, Mesh), array.sharding
  return array.sharding.mesh


@functools.lru_cache
def _replicated(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
  return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _is_shape(leaf: object) -> TypeGuard[jax.ShapeDtypeStruct]:
  return isinstance(leaf, jax.ShapeDtypeStruct)


def _shape_of(leaf: object) -> object:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray | np.generic) else leaf
