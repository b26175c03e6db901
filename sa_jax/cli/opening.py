"""How commands open and save a model: revision, devices, processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax.cli.common import silence
from sa_jax.cli.progress import progress
from sa_jax.config import CacheDtype, FloatDtype, ModelConfig
from sa_jax.distributed import Hosts, start
from sa_jax.errors import UserError
from sa_jax.mesh import MeshSizes
from sa_jax.plan import PlanLike
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax import Tokenizer, Transformer
  from sa_jax.formats.load import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
  """How to open the model."""

  revision: str | None = None
  """For a hub id: a branch, tag or commit."""
  mesh: MeshSizes = MeshSizes(data=1)
  """The device mesh, such as fsdp=4,tensor=2; remaining devices go to data; data=1 uses one device."""
  hosts: Annotated[Hosts, tyro.conf.arg(name="process")] = Hosts()
  """For runs on several hosts."""

  def begin(self) -> None:
    """Connects the processes, of which only the first prints and writes; must run before anything uses devices."""
    start(self.hosts)
    silence()

  def config(self, model: Path) -> ModelConfig:
    """The model's config, without reading weights."""
    from sa_jax.formats.source import model_of, open_source

    config, _ = model_of(open_source(model, self.revision, "config"))
    return config

  def tokenizer(self, model: Path) -> Tokenizer:
    """The model's tokenizer."""
    from sa_jax import load_tokenizer

    return load_tokenizer(model, revision=self.revision)

  def open(
    self,
    model: Path,
    plan: PlanLike = None,
    dtype: FloatDtype | None = None,
    layout: Layout = "layers",
    cache_dtype: CacheDtype = None,
  ) -> tuple[Transformer, Params]:
    """The model, with a cache of this dtype, and its parameters; see `sa_jax.from_pretrained`."""
    from sa_jax import Transformer, from_pretrained

    with progress(f"opening {model.name}") as report:
      opened, params = from_pretrained(
        model,
        plan,
        dtype,
        mesh=None if self.mesh.size == 1 and self.mesh.data else self.mesh.mesh(),
        layout=layout,
        revision=self.revision,
        progress=report,
      )
    return Transformer(dataclasses.replace(opened.config, cache_dtype=cache_dtype), opened.plan), params

  def open_dense(self, model: Path, to_save: FloatDtype = "float32") -> tuple[Transformer, Params]:
    """The dense model in float32, after checking that it can be saved in a dtype.

    Raises:
      UserError: if it cannot.
    """
    opened, params = self.open(model, "dense", "float32")
    check_range(params, to_save)
    return opened, params

  def save(
    self, path: Path, source: Path, model: Transformer, params: Params, dtype: FloatDtype, card: str = ""
  ) -> None:
    """Writes a checkpoint in a dtype, with the source's tokenizer and other extra files, and a model card if given.

    Raises:
      UserError: if the folder exists, or the dtype cannot hold the parameters.
    """
    import jax
    import jax.numpy as jnp

    from sa_jax.formats.save import write
    from sa_jax.formats.source import open_source

    model = model.clone(config=dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype))
    check_range(params, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    opened = open_source(source, self.revision)

    def extras(folder: Path) -> None:
      opened.save_extras(folder)
      if card:
        (folder / "README.md").write_text(card, encoding="utf-8")

    write(path, model, params, extras)


def check_range(params: Params, dtype: FloatDtype) -> None:
  """Checks that a dtype can hold the parameters, which float16 would store as infinite beyond 65,504.

  Raises:
    UserError: names the parameters that it cannot hold.
  """
  import jax
  import jax.numpy as jnp

  from sa_jax.programs import fetch

  if dtype != "float16":
    return
  limit = float(jnp.finfo(dtype).max)
  # Not of absolute values, which would be a copy of the parameters. One program: on a mesh these are many collectives.
  of_leaf = lambda leaf: jnp.maximum(jnp.max(leaf), -jnp.min(leaf))
  largest = fetch(jax.jit(lambda params: jax.tree.map(of_leaf, params))(params))
  faults = [
    f"{jax.tree_util.keystr(path, simple=True, separator='/')} has numbers up to {number:.4g}"
    for path, number in jax.tree_util.tree_leaves_with_path(largest)
    if number > limit
  ]
  if faults:
    raise UserError.of(f"float16 ends at {limit:,.0f}; store the model in bfloat16 (`dtype=bfloat16`)", faults)
