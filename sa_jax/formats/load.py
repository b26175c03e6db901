"""Opening a checkpoint under a plan, and writing one of our own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats import checkpoint, hf_config
from sa_jax.formats.lazy import Progress, lazy_tree, place, stack_lazily
from sa_jax.formats.source import Source, copy_extras, locate, open_source
from sa_jax.formats.table import Account, account, entries, head_keys
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_plan
from sa_jax.params import stack
from sa_jax.plan import SharingPlan, as_plan
from sa_jax.sharding import abstract_params, param_shardings

Layout = Literal["runs", "layers"]


def from_pretrained(
  path: str | Path,
  plan: SharingPlan | str | Sequence[int] | None = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  *,
  layout: Layout = "runs",
  revision: str | None = None,
  progress: Progress | None = None,
) -> tuple[Transformer, dict[str, Any]]:
  """Opens a checkpoint as a model that shares attention by a plan.

  Tensors are mapped one at a time, cast to ``dtype``, placed (each device reads its own slice) and released. Queries
  and keys of followers are not read.

  Args:
    path: a Hugging Face folder (safetensors or PyTorch's ``.bin``, of a family in `sa_jax.formats.families`), a hub id
      such as ``org/model``, a GGUF file (Llama architecture) or an sa_jax checkpoint.
    plan: a `SharingPlan`, a plan string or a ``source`` list; None for the checkpoint's own plan, dense if it has none.
      A string or list says nothing of head maps: followers that keep their stored anchor keep their stored map.
    dtype: of parameters and activations: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's when None.
    mesh: where parameters go, by `sa_jax.sharding.DEFAULT_RULES`; the default device when None.
    layout: ``runs``, as ``model.init`` makes them, for scoring and training; ``layers`` for decoding. `generate` takes
      both, but must hold a second copy of the weights while it runs with ``runs``.
    revision: of a hub id: a branch, tag or commit.
    progress: called with (tensors placed, tensors in all).

  Returns:
    The model, and parameters that ``model.apply({"params": params}, tokens)`` takes.

  Raises:
    UserError: if the checkpoint is damaged, of an unsupported architecture, not what its config describes, or lacks
      weights that the plan needs. Every mismatch is listed.
  """
  if layout not in ("runs", "layers"):
    raise UserError(f"there is no layout {layout!r}; there are 'runs' and 'layers'")
  path = locate(path, revision)
  if checkpoint.is_checkpoint(path):
    return _open_checkpoint(path, plan, dtype, mesh, layout, progress)
  source = open_source(path)
  config, made, found = _describe(source, plan, dtype)
  _check_tied(source, config)
  model = Transformer(config, made)
  tree = lazy_tree(source, found.used, config.param_dtype)
  if layout == "runs":
    tree = stack(tree, made, join=stack_lazily)
  shardings = SingleDeviceSharding(jax.devices()[0]) if mesh is None else param_shardings(model, mesh, layout=layout)
  return model, place(tree, shardings, progress)


def describe(
  path: str | Path,
  plan: SharingPlan | str | Sequence[int] | None = None,
  dtype: str | None = None,
  *,
  revision: str | None = None,
) -> Transformer:
  """The model that `from_pretrained` would open, without reading its weights; arguments and errors as there."""
  path = locate(path, revision)
  if checkpoint.is_checkpoint(path):
    return _describe_checkpoint(path, plan, dtype)
  config, made, _ = _describe(open_source(path), plan, dtype)
  return Transformer(config, made)


def _describe(
  source: Source, plan: SharingPlan | str | Sequence[int] | None, dtype: str | None
) -> tuple[ModelConfig, SharingPlan, Account]:
  config = _with_dtype(hf_config.read(source.config), dtype)
  stored = hf_config.read_plan(source.config, config.num_layers)
  made = _asked(plan, stored)
  check_plan(config, made)
  return config, made, account(source.shapes, config, made, source.path)


def _check_tied(source: Source, config: ModelConfig) -> None:
  """Checks that a head which the config ties to the embedding, and which is stored all the same, is the embedding.

  Raises:
    UserError: if it is not.
  """
  stored = [key for key in head_keys(config) if key in source.shapes] if config.tie_embeddings else []
  for key in stored:
    (embedding,) = (entry.key for entry in entries(config) if entry.path == ("embed", "embedding"))
    if not np.array_equal(source.read(key), source.read(embedding)):
      raise UserError(
        f"{source.path}: the config ties the output head to the embedding, but {key} differs from {embedding}; if the "
        "head was trained by itself, set tie_word_embeddings to false in config.json"
      )


def _asked(plan: SharingPlan | str | Sequence[int] | None, stored: SharingPlan) -> SharingPlan:
  """The plan asked for. A string or list says nothing of head maps: followers that keep their anchor keep their map."""
  if plan is None:
    return stored
  made = as_plan(plan, stored.num_layers)
  if isinstance(plan, SharingPlan):
    return made
  kept = [layer for layer in made.followers if made.source[layer] == stored.source[layer]]
  return made.with_head_maps({layer: stored.head_map_of(layer) for layer in kept})


def _with_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
  if dtype is None:
    return config
  if dtype not in hf_config.DTYPES:
    raise UserError(f"dtype {dtype!r} is not supported; one of {', '.join(hf_config.DTYPES)} is")
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _describe_checkpoint(path: Path, plan: SharingPlan | str | Sequence[int] | None, dtype: str | None) -> Transformer:
  config, stored_plan = checkpoint.read_config(path)
  made = _asked(plan, stored_plan)
  if lost := sorted(set(made.anchors) - set(stored_plan.anchors)):
    raise UserError(
      f"the plan '{made}' makes layers {lost} anchors, but {path} holds no queries and keys for them: it was made for "
      f"the plan '{stored_plan}'; start from the dense checkpoint"
    )
  checkpoint.check_stored(path, checkpoint.stored_shapes(path), config, stored_plan)
  return Transformer(_with_dtype(config, dtype), made)


def _open_checkpoint(
  path: Path,
  plan: SharingPlan | str | Sequence[int] | None,
  dtype: str | None,
  mesh: Mesh | None,
  layout: Layout,
  progress: Progress | None,
) -> tuple[Transformer, dict[str, Any]]:
  model = _describe_checkpoint(path, plan, dtype)
  target = abstract_params(model, layout="layers")
  if mesh is None:
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), target)
  else:
    shardings = param_shardings(model, mesh, layout="layers")
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target, shardings
  )
  params = checkpoint.restore(path, target)
  if progress is not None:  # Orbax reads them side by side, and tells of none
    progress(count := len(jax.tree.leaves(params)), count)
  return model, stack(params, model.plan, donate=True) if layout == "runs" else params


def convert(
  src: str | Path,
  dst: str | Path,
  plan: SharingPlan | str | Sequence[int] | None = None,
  dtype: str | None = "bfloat16",
  *,
  revision: str | None = None,
  progress: Progress | None = None,
) -> None:
  """Converts a Hugging Face folder or a GGUF file into an sa_jax checkpoint, pruned to the plan.

  Tensors are read, transformed and written one at a time, so a model larger than memory converts.

  Args:
    src: the model to read; see `from_pretrained`. Of an sa_jax checkpoint, another with other plan or dtype is made.
    dst: the folder to write, which must not exist. It appears only once it is complete.
    plan: see `from_pretrained`. A dense checkpoint can be opened under any plan later; a pruned one is smaller.
    dtype: to store; the source's when None.
    revision: of a hub id: a branch, tag or commit.
    progress: called with (parameters written, parameters in all).

  Raises:
    UserError: as `from_pretrained`, or if ``dst`` exists.
  """
  dst = Path(dst)
  if dst.exists():
    raise UserError(f"{dst} exists already; name a new folder, or remove it first")
  path = locate(src, revision)
  if checkpoint.is_checkpoint(path):
    model = _describe_checkpoint(path, plan, dtype)
    tree = checkpoint.lazy_params(path, abstract_params(model, layout="layers"))
    checkpoint.save_checkpoint(dst, model.config, model.plan, tree, functools.partial(copy_extras, path), progress)
    return
  source = open_source(path)
  config, made, found = _describe(source, plan, dtype)
  _check_tied(source, config)
  tree = lazy_tree(source, found.used, config.param_dtype)
  checkpoint.save_checkpoint(dst, config, made, tree, source.save_extras, progress)


def inspect(
  path: str | Path, plan: SharingPlan | str | Sequence[int] | None = None, *, revision: str | None = None
) -> Account:
  """What a Hugging Face folder, hub id or GGUF file holds and what the plan drops, without reading the weights.

  Raises:
    UserError: as `from_pretrained`.
  """
  return _describe(open_source(locate(path, revision)), plan, None)[2]
