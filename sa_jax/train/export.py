"""Writes a trained model as a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from sa_jax.formats.save import write
from sa_jax.nn import Transformer
from sa_jax.trees import Tree


def write_trained(
  path: Path, model: Transformer, params: Tree, dtype: str, save_extras: Callable[[Path], None]
) -> None:
  """Writes a checkpoint that `sa_jax.from_pretrained` opens.

  All hosts take part in gathering the parameters; the first writes.

  Args:
    path: the folder.
    model: the parameters' model.
    params: in either layout, on any mesh.
    dtype: stored dtype.
    save_extras: writes the files that go with the model, such as its tokenizer.

  Raises:
    UserError: if it cannot be written.
  """
  cast = jax.jit(lambda leaf: leaf.astype(dtype))
  config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype, remat="none")
  write(path, Transformer(config, model.plan), jax.tree.map(cast, params), save_extras)
