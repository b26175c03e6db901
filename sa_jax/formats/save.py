"""Saves a model in memory to files, and loads it back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from sa_jax.config import Compute
from sa_jax.distributed import run_on_first
from sa_jax.errors import UserError
from sa_jax.files import as_path
from sa_jax.formats.checkpoint import save_checkpoint
from sa_jax.formats.extras import read_json
from sa_jax.formats.load import Layout, from_pretrained
from sa_jax.formats.table import differences
from sa_jax.formats.tokenizer import Tokenizer
from sa_jax.nn import Transformer
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.sharding import abstract_params
from sa_jax.trees import Params

_MEMORY = "sa_jax.json"
"""What only `load` needs: the layout and the compute settings."""


def save(path: str | Path, model: Transformer, params: Params, tokenizer: Tokenizer | None = None) -> None:
  """Writes a model as an sa_jax checkpoint, which `load` restores exactly and `from_pretrained` opens.

  All processes must call it: each takes part in gathering the parameters, and the first writes.

  Args:
    path: the folder, which must not exist. It appears only when complete.
    model: the parameters' model.
    params: in either layout, on any mesh, or NumPy arrays; all of the same floating-point dtype, which is stored.
    tokenizer: saved with the model.

  Raises:
    UserError: if the folder exists or cannot be written, or the parameters do not fit the model.
  """
  params = nn.unbox(params)
  layout: Layout = "layers" if "layers" in params else "runs"
  _check(model, params, layout)
  (dtype,) = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  model = model.clone(config=dataclasses.replace(model.config, param_dtype=dtype))

  def extras(folder: Path) -> None:
    values = {"layout": layout, "compute": dataclasses.asdict(model.config.compute)}
    (folder / _MEMORY).write_text(json.dumps(values, indent=2), encoding="utf-8")
    if tokenizer is not None:
      tokenizer.save(folder)

  write(as_path(path), model, params, extras)


def load(path: str | Path, mesh: Mesh | None = None) -> tuple[Transformer, Params]:
  """Restores what `save` wrote: the model, and the parameters in their original layout.

  Other models are opened as by `from_pretrained`.

  Args:
    path: the folder.
    mesh: where parameters are placed; see `from_pretrained`.

  Raises:
    UserError: see `from_pretrained`.
  """
  file = as_path(path) / _MEMORY
  if not file.exists():
    return from_pretrained(path, mesh=mesh)
  values = read_json(file)
  layout: Any = values.get("layout")
  compute = values.get("compute")
  if not isinstance(compute, dict) or set(compute) - {field.name for field in dataclasses.fields(Compute)}:
    raise UserError(f"{file} must have a 'layout', and a 'compute' with fields of sa_jax.config.Compute")
  model, params = from_pretrained(path, mesh=mesh, layout=layout)
  # The stored dtype was read above.
  compute = compute | {"param_dtype": model.config.param_dtype}
  return model.clone(config=dataclasses.replace(model.config, **compute)), params


def write(path: Path, model: Transformer, params: Params, save_extras: Callable[[Path], None]) -> None:
  """Gathers the parameters, in either layout; the first process writes them; arguments as in `save`."""
  # Parameters are gathered on all hosts one by one, and kept only on the first.
  held = jax.tree.map(lambda leaf: _only_if(jax.process_index() == 0, fetch(leaf)), params)
  layers = lambda: as_layers(held, model.plan)
  run_on_first("the checkpoint", lambda: save_checkpoint(path, model.config, model.plan, layers(), save_extras))


def _only_if(wanted: bool, array: np.ndarray) -> np.ndarray | None:
  return array if wanted else None


def _check(model: Transformer, params: Params, layout: Layout) -> None:
  """Checks that the parameters fit the model, have one floating-point dtype, and that nothing would be lost."""
  if own := model.blocks.own:
    raise UserError(
      f"the model uses {' and '.join(own)}, which a checkpoint does not store: `load` would build a different model. "
      "Save only the parameters, for example with Orbax, and build the model in code"
    )
  named = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  wanted, found = named(abstract_params(model, layout=layout)), named(params)
  faults = differences(*({name: leaf.shape for name, leaf in each.items()} for each in (found, wanted)))
  types = {str(leaf.dtype): name for name, leaf in found.items()}
  if len(types) > 1:
    faults.append(f"all must have one dtype, not {', '.join(f'{each} ({name})' for each, name in types.items())}")
  if faults:
    raise UserError.of(f"the parameters in the layout {layout!r} do not match the model", faults)
