"""Opens checkpoints under a plan, and converts them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from sa_jax.display import Progress
from sa_jax.distributed import check_given, run_on_all, runs_on_first
from sa_jax.errors import UserError, shown
from sa_jax.files import as_path, check_absent
from sa_jax.formats import checkpoint
from sa_jax.formats.lazy import place, stack_lazily
from sa_jax.formats.opened import Opened, open_model
from sa_jax.formats.table import Account
from sa_jax.nn import Transformer
from sa_jax.params import stack
from sa_jax.plan import PlanLike
from sa_jax.sharding import DEFAULT_RULES, Rules, param_shardings
from sa_jax.trees import Tree

Layout = Literal["runs", "layers"]


def from_pretrained(
  path: str | Path,
  plan: PlanLike = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  *,
  rules: Rules = DEFAULT_RULES,
  layout: Layout = "runs",
  revision: str | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> tuple[Transformer, dict[str, Tree]]:
  """Opens a checkpoint as a model under a sharing plan.

  Tensors are mapped one at a time, cast to ``dtype``, placed (each device reads its own slice) and released. Queries
  and keys of followers are not read.

  Args:
    path: a Hugging Face folder (safetensors or PyTorch's ``.bin``, of a family in `sa_jax.formats.families`), a hub id
      such as ``org/model``, a GGUF file (of an architecture in `sa_jax.formats.gguf_architectures`) or an sa_jax
      checkpoint; on a disk, or in a bucket such as ``gs://bucket/model``.
    plan: a `SharingPlan`, a plan string or a ``source`` list; None for the checkpoint's own plan, dense if it has none.
      With a string or list, followers that keep their stored anchor keep their stored head map.
    dtype: type of parameters and activations: ``float32``, ``bfloat16`` or ``float16``; None for the checkpoint's.
    mesh: where parameters are placed and used; None for the default device.
    rules: how parameters are sharded, logical axis → mesh axis.
    layout: ``runs``, as in ``model.init``, for scoring and training; ``layers`` for decoding. `generate` accepts both,
      but holds a second copy of the weights while it runs with ``runs``.
    revision: for a hub id: a branch, tag or commit.
    strict: whether unknown keys in ``config.json`` are errors; otherwise a warning lists them.
    progress: called with (tensors placed, total tensors).

  Returns:
    The model, and parameters that ``model.apply({"params": params}, tokens)`` takes.

  Raises:
    UserError: if the checkpoint is damaged, of an unsupported architecture, not what its config describes, or lacks
      weights that the plan needs; lists every mismatch. Also if the mesh is invalid, or the rules cannot shard the
      parameters over it.
  """
  if layout not in ("runs", "layers"):
    raise UserError(f"unknown layout {layout!r}; choose 'runs' or 'layers'")
  if not isinstance(mesh, Mesh | None):
    raise UserError(f"mesh must be a device mesh, such as sa_jax.sharding.make_mesh(fsdp=8), not {shown(repr(mesh))}")
  if mesh is None and rules != DEFAULT_RULES:
    raise UserError("rules need a mesh: give mesh= too")
  spread = mesh is not None and mesh.is_multi_process
  if spread:
    check_given("from_pretrained", {"mesh": mesh, "rules": rules, "dtype": dtype, "plan": plan, "layout": layout})
  read = functools.partial(open_model, path, plan, dtype, revision, strict)
  # If a file is missing on one process, the others must not wait forever.
  opened = run_on_all("the files of the model", read, _fingerprint) if spread else read()
  model = Transformer(opened.config, opened.plan)
  tree = opened.tree()
  if layout == "runs":
    tree = stack(tree, model.plan, join=stack_lazily)
  if mesh is None:
    return model, place(tree, SingleDeviceSharding(jax.local_devices()[0]), progress)
  return model, place(tree, param_shardings(model, mesh, rules, layout=layout), progress)


def _fingerprint(opened: Opened) -> object:
  """Equal on hosts that read the same model; comparing the weights would take too long."""
  shapes = sorted((name, tuple(shape)) for name, shape in opened.source.shapes.items())
  return opened.config, opened.plan, shapes


def describe(
  path: str | Path,
  plan: PlanLike = None,
  dtype: str | None = None,
  *,
  revision: str | None = None,
) -> Transformer:
  """The model that `from_pretrained` would open, without reading its weights; same arguments and errors."""
  opened = open_model(path, plan, dtype, revision)
  return Transformer(opened.config, opened.plan)


@runs_on_first("the conversion")
def convert(
  src: str | Path,
  dst: str | Path,
  plan: PlanLike = None,
  dtype: str | None = "bfloat16",
  *,
  revision: str | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> None:
  """Converts a Hugging Face folder, a GGUF file or an sa_jax checkpoint into an sa_jax checkpoint, pruned to the plan.

  Tensors are read, transformed and written one at a time, so a model larger than memory converts.

  Args:
    src: the model to read; see `from_pretrained`.
    dst: the folder to write, which must not exist. It appears only once it is complete.
    plan: see `from_pretrained`. A dense checkpoint can be opened under any plan later; a pruned one is smaller.
    dtype: stored dtype; None for the source's.
    revision: for a hub id: a branch, tag or commit.
    strict: see `from_pretrained`.
    progress: called with (parameters written, total parameters).

  Raises:
    UserError: as `from_pretrained`, or if ``dst`` exists.
  """
  check_absent(dst := as_path(dst))
  opened = open_model(src, plan, dtype, revision, strict)
  extras = opened.source.save_extras
  checkpoint.save_checkpoint(dst, opened.config, opened.plan, opened.tree(), extras, progress)


def inspect(path: str | Path, plan: PlanLike = None, *, revision: str | None = None, strict: bool = False) -> Account:
  """The tensors of a model's files, and those that the plan drops, without reading the weights; see `from_pretrained`.

  Raises:
    UserError: see `from_pretrained`.
  """
  return open_model(path, plan, revision=revision, strict=strict).account
