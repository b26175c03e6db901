"""Opening a checkpoint under a plan, and writing one of our own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from sa_jax.config import ModelConfig
from sa_jax.convert import checkpoint, hf_config
from sa_jax.convert.source import Source, open_source
from sa_jax.convert.table import Account, Entry, account
from sa_jax.convert.tokenizer import Tokenizer, load_tokenizer
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_plan
from sa_jax.params import stack
from sa_jax.plan import SharingPlan, as_plan
from sa_jax.sharding import abstract_params, param_shardings

Layout = Literal["runs", "layers"]
Progress = Callable[[int, int], None]


class LazyTensor(NamedTuple):
  """A parameter that has not been read yet."""

  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]


def from_pretrained(
  path: str | Path,
  plan: SharingPlan | str | Sequence[int] | None = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  *,
  layout: Layout = "runs",
  progress: Progress | None = None,
) -> tuple[Transformer, dict[str, Any]]:
  """Opens a checkpoint as a model that shares attention by a plan.

  Tensors are read one at a time, cast to ``dtype``, placed, and released. Queries and keys of followers are not read.

  Args:
    path: a Hugging Face folder (Llama family, safetensors), a GGUF file (Llama architecture) or an sa_jax checkpoint.
    plan: a `SharingPlan`, a plan string or a ``source`` list; None for the checkpoint's own plan, dense if it has none.
    dtype: of parameters and activations: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's when None.
    mesh: where parameters go, by `sa_jax.sharding.DEFAULT_RULES`; the default device when None.
    layout: ``runs``, as ``model.init`` makes them, for scoring and training; ``layers`` for decoding. `generate` takes
      both, but must hold a second copy of the weights while it runs with ``runs``.
    progress: called with (parameters placed, parameters in all).

  Returns:
    The model, and parameters that ``model.apply({"params": params}, tokens)`` takes.

  Raises:
    ValueError: if the checkpoint is damaged, of an unsupported architecture, not what its config describes, or lacks
      weights that the plan needs. Every mismatch is listed.
  """
  if layout not in ("runs", "layers"):
    raise ValueError(f"there is no layout {layout!r}; there are 'runs' and 'layers'")
  path = Path(path)
  if checkpoint.is_checkpoint(path):
    return _open_checkpoint(path, plan, dtype, mesh, layout)
  source = open_source(path)
  config, made, found = _describe(source, plan, dtype)
  model = Transformer(config, made)
  tree: dict[str, Any] = {}
  for entry in found.used:
    *parents, leaf = entry.path
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[leaf] = LazyTensor(entry.our_shape(), functools.partial(_read, source, entry))
  if layout == "runs":
    tree = stack(tree, made, join=_stack_lazily)
  return model, _place(tree, model, mesh, layout, progress)


def _describe(
  source: Source, plan: SharingPlan | str | Sequence[int] | None, dtype: str | None
) -> tuple[ModelConfig, SharingPlan, Account]:
  config = _with_dtype(hf_config.read(source.config), dtype)
  stored = hf_config.read_plan(source.config, config.num_layers)
  made = stored if plan is None else as_plan(plan, config.num_layers)
  check_plan(config, made)
  return config, made, account(source.shapes, config, made, source.path)


def _with_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
  if dtype is None:
    return config
  if dtype not in hf_config.DTYPES:
    raise ValueError(f"dtype {dtype!r} is not supported; one of {', '.join(hf_config.DTYPES)} is")
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _read(source: Source, entry: Entry) -> np.ndarray:
  return entry.to_ours(source.read(entry.key))


def _stack_lazily(leaves: Sequence[LazyTensor], leading: tuple[int, ...]) -> LazyTensor:
  shape = leaves[0].shape

  def load() -> np.ndarray:
    out: np.ndarray | None = None
    for index, leaf in enumerate(leaves):
      value = leaf.load()
      if out is None:
        out = np.empty((len(leaves), *shape), value.dtype)
      out[index] = value
    assert out is not None
    return out.reshape(*leading, *shape)

  return LazyTensor((*leading, *shape), load)


def _place(
  tree: Mapping[str, Any], model: Transformer, mesh: Mesh | None, layout: Layout, progress: Progress | None
) -> dict[str, Any]:
  """Reads every parameter, one at a time, onto its device or devices."""
  leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, LazyTensor))
  if mesh is None:
    shardings = [SingleDeviceSharding(jax.devices()[0])] * len(leaves)
  else:
    shardings = jax.tree.leaves(param_shardings(model, mesh, layout=layout))
  placed = []
  for index, (leaf, sharding) in enumerate(zip(leaves, shardings, strict=True)):
    value = leaf.load().astype(jnp.dtype(model.config.param_dtype))
    placed.append(jax.make_array_from_callback(value.shape, sharding, value.__getitem__))
    if progress is not None:
      progress(index + 1, len(leaves))
  return jax.tree.unflatten(structure, placed)


def _open_checkpoint(
  path: Path, plan: SharingPlan | str | Sequence[int] | None, dtype: str | None, mesh: Mesh | None, layout: Layout
) -> tuple[Transformer, dict[str, Any]]:
  config, stored_plan = checkpoint.read_config(path)
  made = stored_plan if plan is None else as_plan(plan, config.num_layers)
  if lost := sorted(set(made.anchors) - set(stored_plan.anchors)):
    raise ValueError(
      f"the plan '{made}' makes layers {lost} anchors, but {path} holds no queries and keys for them: it was made for "
      f"the plan '{stored_plan}'; start from the dense checkpoint"
    )
  model = Transformer(_with_dtype(config, dtype), made)
  target = abstract_params(model, layout="layers")
  stored = dict(_paths(checkpoint.stored_shapes(path)))
  wanted = dict(_paths(target))
  errors = [f"missing: {name} {list(leaf.shape)}" for name, leaf in wanted.items() if name not in stored]
  errors += [
    f"wrong shape: {name} is {list(stored[name].shape)}, the config says {list(leaf.shape)}"
    for name, leaf in wanted.items()
    if name in stored and stored[name].shape != leaf.shape
  ]
  known = dict(_paths(abstract_params(Transformer(config, stored_plan), layout="layers")))
  errors += [f"unknown: {name} {list(leaf.shape)}" for name, leaf in stored.items() if name not in known]
  if errors:
    raise ValueError(f"{path} does not hold the model that its config describes:\n  " + "\n  ".join(errors))
  if mesh is None:
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), target)
  else:
    shardings = param_shardings(model, mesh, layout="layers")
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target, shardings
  )
  params = checkpoint.restore(path, target)
  return model, stack(params, made, donate=True) if layout == "runs" else params


def _paths(tree: Any) -> list[tuple[str, jax.ShapeDtypeStruct]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def convert(
  src: str | Path,
  dst: str | Path,
  plan: SharingPlan | str | Sequence[int] | None = None,
  dtype: str | None = "bfloat16",
  *,
  progress: Progress | None = None,
) -> None:
  """Converts a Hugging Face folder or a GGUF file into an sa_jax checkpoint, pruned to the plan.

  Args:
    src: the model to read; see `from_pretrained`.
    dst: the folder to write, which must not exist. It appears only once it is complete.
    plan: see `from_pretrained`. A dense checkpoint can be opened under any plan later; a pruned one is smaller.
    dtype: to store; the source's when None.
    progress: called with (parameters read, parameters in all).

  Raises:
    ValueError: as `from_pretrained`, or if ``dst`` exists.
  """
  dst = Path(dst)
  if dst.exists():
    raise ValueError(f"{dst} exists already; name a new folder, or remove it first")
  tokenizer = _tokenizer(Path(src))
  model, params = from_pretrained(src, plan, dtype, layout="layers", progress=progress)
  checkpoint.save_checkpoint(dst, model.config, model.plan, params, tokenizer)


def _tokenizer(path: Path) -> Tokenizer | None:
  """The tokenizer that comes with a model, if one does."""
  if not checkpoint.is_checkpoint(path):
    return open_source(path).tokenizer()
  return load_tokenizer(path) if (path / "tokenizer.json").exists() else None


def inspect(path: str | Path, plan: SharingPlan | str | Sequence[int] | None = None) -> Account:
  """What a Hugging Face folder or GGUF file holds and what the plan drops, without reading the weights.

  Raises:
    ValueError: as `from_pretrained`.
  """
  return _describe(open_source(Path(path)), plan, None)[2]
