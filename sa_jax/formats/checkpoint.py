"""Writes sa_jax checkpoints: ``config.json``, the tokenizer, and ``params/``, an Orbax tree in the layer layout."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.display import Progress
from sa_jax.files import as_path, new_folder
from sa_jax.formats import hf_config, hf_plan
from sa_jax.formats.lazy import LazyTensor, contiguous
from sa_jax.formats.orbax_folder import PARAMS
from sa_jax.plan import SharingPlan
from sa_jax.trees import Params

_IN_FLIGHT_BYTES = 200_000_000  # bytes in flight: enough to hide disk latency


def save_checkpoint(
  path: str | Path,
  config: ModelConfig,
  plan: SharingPlan,
  params: Params,
  save_extras: Callable[[Path], None] | None = None,
  progress: Progress | None = None,
) -> None:
  """Writes a checkpoint that `sa_jax.from_pretrained` opens under any plan that it has the weights for.

  Args:
    path: a folder that does not exist yet.
    config: the model.
    plan: the plan that the parameters are pruned to.
    params: in the layer layout: arrays, or `LazyTensor`s, which are read and written one by one.
    save_extras: writes the files that go with the model, such as its tokenizer, into the folder.
    progress: called with (lazy tensors written, total lazy tensors).

  Raises:
    UserError: if the folder exists or cannot be created.
  """
  import orbax.checkpoint as ocp

  with new_folder(as_path(path)) as folder:
    values = hf_config.write(config) | {"shared_attention": hf_plan.write_plan(plan, config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    if save_extras is not None:
      save_extras(folder)
    started: list[_Writing] = []
    handler = _handler(progress, started)
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
      try:
        checkpointer.save(folder.resolve() / PARAMS, ocp.args.PyTreeSave(params))
      except BaseException:
        for writing in started:  # pending writes would create the folder again after its removal
          with contextlib.suppress(Exception):
            writing.result()
        raise


class _Writing(Protocol):
  def result(self) -> object: ...


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Stops Orbax from logging tracebacks of exceptions that it also raises."""
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    log.setLevel(level)


def _handler(progress: Progress | None, started: list[_Writing]) -> Any:
  """Orbax's tree handler, extended to `LazyTensor`s.

  Weights hardly compress, and compressing them takes longer than writing them.

  Args:
    progress: see `save_checkpoint`.
    started: receives the futures of all pending writes.
  """
  import orbax.checkpoint as ocp
  import tensorstore as ts
  from orbax.checkpoint import type_handlers

  class Recording:
    """Records pending writes."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
      futures: Sequence[_Writing] = await super().serialize(values, infos, args)  # type: ignore[misc]
      started.extend(futures)
      return futures

  class NumpyHandler(Recording, type_handlers.NumpyHandler):
    """Writes NumPy arrays."""

  class ArrayHandler(Recording, type_handlers.ArrayHandler):
    """Writes JAX arrays."""

  class LazyHandler(NumpyHandler):
    """Writes lazy tensors as arrays, one by one; a few are being written while the next is read.

    A stack of experts is written expert by expert, each as a separate chunk.
    """

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
      writing: collections.deque[tuple[int, Any]] = collections.deque()
      for done, (value, info, arg) in enumerate(zip(values, infos, args, strict=True)):
        # Reading may itself run an event loop, as Orbax does, so it cannot be in this one's thread.
        array = value if value.leading and in_parts else contiguous(await asyncio.to_thread(value.read_whole))
        for future in await super().serialize([array], [info], [arg]):
          writing.append((array.nbytes, future))
        del array
        while sum(nbytes for nbytes, _ in writing) > _IN_FLIGHT_BYTES:
          writing.popleft()[1].result()
        if progress is not None:
          progress(done + 1, len(values))
      return [future for _, future in writing]

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
      if not isinstance(value, LazyTensor):
        await super()._open_and_write(value, tspec, ts_context)
        return
      tspec["metadata"]["chunks"] = [1] * len(value.leading) + list(value.layer_shape)
      array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
      for number in range(len(value.readers)):
        part = contiguous(await asyncio.to_thread(value.read, number))
        place = tuple(int(each) for each in np.unravel_index(number, value.leading))
        await array[place].write(part, can_reference_source_data_indefinitely=True)

  # Orbax before 0.12.6 lacks this option, and copies each array before writing it.
  uncopied = {"deepcopy_host_arrays": False}
  options = uncopied if uncopied.keys() <= inspect.signature(type_handlers.NumpyHandler).parameters.keys() else {}
  # And older versions write only whole arrays.
  in_parts = bool(options) and hasattr(type_handlers.NumpyHandler, "_open_and_write")
  registry = type_handlers.create_type_handler_registry(
    (LazyTensor, LazyHandler(**options)),
    (np.ndarray, NumpyHandler()),
    (jax.Array, ArrayHandler()),
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=registry, use_compression=False, multiprocessing_options=_alone()
  )


def _alone() -> Any:
  """Orbax options for a process that writes alone, whatever the other processes of the program do."""
  import orbax.checkpoint as ocp

  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"of-{me}")
