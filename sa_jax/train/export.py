"""A trained model as a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from sa_jax.formats.checkpoint import save_checkpoint
from sa_jax.nn import Transformer
from sa_jax.params import as_layers
from sa_jax.train.distributed import wait_for_all
from sa_jax.trees import Tree


def export(path: Path, model: Transformer, params: Tree, dtype: str, save_extras: Callable[[Path], None]) -> None:
  """Writes a checkpoint that `sa_jax.from_pretrained` opens.

  All hosts take part in gathering the parameters, the first one writes.

  Args:
    path: the folder.
    model: what the parameters are of.
    params: in either layout, on any mesh.
    dtype: of what is written.
    save_extras: writes what travels with the model, such as its tokenizer.

  Raises:
    UserError: if it cannot be written.
  """
  cast = jax.jit(lambda leaf: leaf.astype(dtype))
  held = jax.tree.map(lambda leaf: _gathered(cast(leaf)), params)
  if jax.process_index() == 0:
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype, remat="none")
    save_checkpoint(path, config, model.plan, as_layers(held, model.plan), save_extras)
  wait_for_all("exported")


def _gathered(array: jax.Array) -> np.ndarray:
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(array, tiled=True)
