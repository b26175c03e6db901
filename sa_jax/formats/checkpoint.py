"""sa_jax's own checkpoint: ``config.json``, the tokenizer, and ``params/``, an Orbax tree in the layer layout."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import inspect
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats import hf_config
from sa_jax.formats.lazy import LazyTensor, Progress, in_order
from sa_jax.formats.source import read_json
from sa_jax.formats.table import entries
from sa_jax.plan import SharingPlan

PARAMS = "params"
_IN_FLIGHT_BYTES = 200_000_000  # written at once: enough to hide the disk's delay


def is_checkpoint(path: Path) -> bool:
  """Whether the folder is an sa_jax checkpoint."""
  return (path / PARAMS).is_dir()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill under a temporary name; it gets its own name when the block ends well, and goes when it fails.

  Raises:
    UserError: if the folder exists already.
  """
  if path.exists():
    raise UserError(f"{path} exists already; name a new folder, or remove it first")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
  except OSError as error:
    raise UserError(f"cannot write to {path.parent}: {error.strerror}") from None
  try:
    yield unfinished
    os.rename(unfinished, path)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def save_checkpoint(
  path: str | Path,
  config: ModelConfig,
  plan: SharingPlan,
  params: Mapping[str, Any],
  save_extras: Callable[[Path], None] | None = None,
  progress: Progress | None = None,
) -> None:
  """Writes a checkpoint that `sa_jax.from_pretrained` opens under any plan that it has the weights for.

  Args:
    path: a folder that does not exist yet.
    config: the model.
    plan: the plan that the parameters are pruned to.
    params: in the layer layout: arrays, or `LazyTensor`s, which are read and written one after the other.
    save_extras: writes what travels with the model, such as its tokenizer, into the folder.
    progress: called with (lazy tensors written, lazy tensors in all).

  Raises:
    UserError: if the folder exists or cannot be made.
  """
  import orbax.checkpoint as ocp

  with new_folder(Path(path)) as folder:
    values = hf_config.write(config) | {"shared_attention": hf_config.write_plan(plan)}
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    if save_extras is not None:
      save_extras(folder)
    with ocp.Checkpointer(_handler(progress), multiprocessing_options=_alone()) as checkpointer:
      checkpointer.save(folder.resolve() / PARAMS, ocp.args.PyTreeSave(params))


def _handler(progress: Progress | None) -> Any:
  """Orbax's handler of trees, which can also write `LazyTensor`s.

  Weights hardly compress, and compressing them takes longer than writing them.
  """
  import orbax.checkpoint as ocp
  from orbax.checkpoint import type_handlers

  class LazyHandler(type_handlers.NumpyHandler):
    """Writes lazy tensors as arrays, in turn; a few are on their way to disk while the next is read."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
      writing: collections.deque[tuple[int, Any]] = collections.deque()
      for done, (value, info, arg) in enumerate(zip(values, infos, args, strict=True)):
        # Reading may itself run an event loop, as Orbax does: not in this one's thread.
        array = in_order(await asyncio.to_thread(value.read))
        for future in await super().serialize([array], [info], [arg]):
          writing.append((array.nbytes, future))
        del array
        while sum(nbytes for nbytes, _ in writing) > _IN_FLIGHT_BYTES:
          writing.popleft()[1].result()
        if progress is not None:
          progress(done + 1, len(values))
      return [future for _, future in writing]

  # Orbax before 0.12.6 has no say in it, and copies each array before it writes it.
  uncopied = {"deepcopy_host_arrays": False}
  options = uncopied if uncopied.keys() <= inspect.signature(type_handlers.NumpyHandler).parameters.keys() else {}
  registry = type_handlers.create_type_handler_registry(
    (LazyTensor, LazyHandler(**options)),
    (np.ndarray, type_handlers.NumpyHandler()),
    (jax.Array, type_handlers.ArrayHandler()),
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=registry, use_compression=False, multiprocessing_options=_alone()
  )


def _alone() -> Any:
  """Orbax's options for a process that writes by itself, whatever other processes of the same program do."""
  import orbax.checkpoint as ocp

  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"of-{me}")


def read_config(path: Path) -> tuple[ModelConfig, SharingPlan]:
  """The model and the plan of a checkpoint.

  Raises:
    UserError: if ``config.json`` is missing or cannot be used.
  """
  values = read_json(path / "config.json")
  config = hf_config.read(values)
  return config, hf_config.read_plan(values, config.num_layers)


def stored_shapes(path: Path) -> dict[str, Any]:
  """The tree of `jax.ShapeDtypeStruct` that the checkpoint holds, in the layer layout.

  Raises:
    UserError: if the folder is not a whole Orbax checkpoint.
  """
  import orbax.checkpoint as ocp

  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path.resolve() / PARAMS).item_metadata
    tree = stored.tree
  except (OSError, ValueError, AttributeError, KeyError) as error:
    raise UserError(f"{path / PARAMS} is not a whole checkpoint: {error}") from None
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree, is_leaf=lambda leaf: hasattr(leaf, "dtype")
  )


def check_stored(path: Path, stored: Any, config: ModelConfig, plan: SharingPlan) -> None:
  """Checks that a checkpoint holds the parameters that its config describes, and no others.

  Raises:
    UserError: lists everything that is missing, unknown, or of another shape.
  """
  found = dict(_paths(stored))
  kept = [entry for entry in entries(config) if not entry.is_dropped(plan)]
  wanted = {"/".join(entry.path): entry.our_shape() for entry in kept}
  errors = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
  errors += [f"unknown: {name} {list(leaf.shape)}" for name, leaf in found.items() if name not in wanted]
  errors += [
    f"wrong shape: {name} is {list(found[name].shape)}, the config says {list(shape)}"
    for name, shape in wanted.items()
    if name in found and found[name].shape != shape
  ]
  if errors:
    raise UserError(f"{path} does not hold the model that its config describes:\n  " + "\n  ".join(errors))


def _paths(tree: Any) -> list[tuple[str, jax.ShapeDtypeStruct]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def read(path: Path, stored: Any, wanted: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], np.ndarray]:
  """Some of the parameters, by their paths; ``stored`` as from `stored_shapes`. Errors as in `restore`."""
  sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  target: dict[str, Any] = {}
  for parents in wanted:
    leaf, node = _at(stored, parents), target
    for name in parents[:-1]:
      node = node.setdefault(name, {})
    node[parents[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  params = restore(path, target)
  return {parents: np.asarray(_at(params, parents)) for parents in wanted}


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  return functools.reduce(operator.getitem, path, tree)


def lazy_params(path: Path, wanted: Any) -> Any:
  """The parameters that ``wanted``, a tree of shapes and dtypes, names among a checkpoint's, unread."""
  stored = stored_shapes(path)

  def leaf(keys: Any, shape: jax.ShapeDtypeStruct) -> LazyTensor:
    parents = tuple(key.key for key in keys)
    return LazyTensor((lambda: read(path, stored, [parents])[parents],), shape.shape, (), shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, wanted)


def restore(path: Path, target: Any) -> Any:
  """Reads the parameters named by ``target``, each straight onto its sharding and in its dtype.

  Args:
    path: the checkpoint.
    target: `jax.ShapeDtypeStruct`s with shardings, a subtree of what is stored.

  Raises:
    UserError: if the data is damaged.
  """
  import orbax.checkpoint as ocp

  arguments = ocp.args.PyTreeRestore(
    item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(path.resolve() / PARAMS, args=arguments)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{path / PARAMS} cannot be read: {error}") from None
