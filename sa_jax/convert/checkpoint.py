"""sa_jax's own checkpoint: ``config.json``, the tokenizer, and ``params/``, an Orbax tree in the layer layout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sa_jax.config import ModelConfig
from sa_jax.convert import hf_config
from sa_jax.convert.source import read_json
from sa_jax.convert.tokenizer import Tokenizer
from sa_jax.plan import SharingPlan

PARAMS = "params"


def is_checkpoint(path: Path) -> bool:
  """Whether the folder is an sa_jax checkpoint."""
  return (path / PARAMS).is_dir()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill under a temporary name; it gets its own name when the block ends well, and goes when it fails.

  Raises:
    ValueError: if the folder exists already.
  """
  if path.exists():
    raise ValueError(f"{path} exists already; name a new folder, or remove it first")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
  except OSError as error:
    raise ValueError(f"cannot write to {path.parent}: {error.strerror}") from None
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
  tokenizer: Tokenizer | None = None,
) -> None:
  """Writes a checkpoint that `sa_jax.from_pretrained` opens under any plan that it has the weights for.

  Args:
    path: a folder that does not exist yet.
    config: the model.
    plan: the plan that the parameters are pruned to.
    params: in the layer layout.
    tokenizer: to go with it.

  Raises:
    ValueError: if the folder exists or cannot be made.
  """
  import orbax.checkpoint as ocp

  with new_folder(Path(path)) as folder:
    values = hf_config.write(config) | {"shared_attention": hf_config.write_plan(plan)}
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    if tokenizer is not None:
      tokenizer.save(folder)
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(folder.resolve() / PARAMS, params)


def read_config(path: Path) -> tuple[ModelConfig, SharingPlan]:
  """The model and the plan of a checkpoint.

  Raises:
    ValueError: if ``config.json`` is missing or cannot be used.
  """
  values = read_json(path / "config.json")
  config = hf_config.read(values)
  return config, hf_config.read_plan(values, config.num_layers)


def stored_shapes(path: Path) -> dict[str, Any]:
  """The tree of `jax.ShapeDtypeStruct` that the checkpoint holds, in the layer layout.

  Raises:
    ValueError: if the folder is not a whole Orbax checkpoint.
  """
  import orbax.checkpoint as ocp

  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path.resolve() / PARAMS).item_metadata
    tree = stored.tree
  except (OSError, ValueError, AttributeError, KeyError) as error:
    raise ValueError(f"{path / PARAMS} is not a whole checkpoint: {error}") from None
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree, is_leaf=lambda leaf: hasattr(leaf, "dtype")
  )


def restore(path: Path, target: Any) -> Any:
  """Reads the parameters named by ``target``, each straight onto its sharding and in its dtype.

  Args:
    path: the checkpoint.
    target: `jax.ShapeDtypeStruct`s with shardings, a subtree of what is stored.

  Raises:
    ValueError: if the data is damaged.
  """
  import orbax.checkpoint as ocp

  arguments = ocp.args.PyTreeRestore(
    item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(path.resolve() / PARAMS, args=arguments)
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f"{path / PARAMS} cannot be read: {error}") from None
