"""Diagnostics of all processes: devices, the mesh they would form, backends, storage, versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from sa_jax import ops
from sa_jax.distributed import exchange
from sa_jax.errors import UserError
from sa_jax.files import as_path, check_writable, is_remote
from sa_jax.mesh import MeshSizes

_PACKAGES = ("sa-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One finding about an installation.

  Attributes:
    about: what was checked.
    found: the result.
    is_fault: whether it needs to be fixed.
  """

  about: str
  found: str
  is_fault: bool = False


def examine(mesh: MeshSizes = MeshSizes(), paths: Sequence[Path] = ()) -> list[Finding]:
  """Checks what a run would need. All processes call it together, with the same results except for their own storage.

  Args:
    mesh: sizes of the mesh; by default all devices over ``data``.
    paths: folders that a run would read from and write to.
  """
  found = [Finding("versions", _versions()), *_processes(), _mesh(mesh)]
  found += [Finding(f"attention of {kind} rows", _backends(packed=kind == "packed")) for kind in ("whole", "packed")]
  return found + [_storage(path) for path in paths]


def _versions() -> str:
  found = [f"Python {platform.python_version()}"]
  for name in _PACKAGES:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return ", ".join(found)


def _processes() -> list[Finding]:
  devices = jax.local_devices()
  mine = f"{socket.gethostname()}: {len(devices)} × {devices[0].device_kind} ({devices[0].platform})"
  said = exchange("the doctor's devices", mine)
  versions = exchange("the doctor's versions", _versions())
  wrong = [str(process) for process, each in enumerate(versions) if each != versions[0]]
  found = [Finding(f"process {process} of {len(said)}", each) for process, each in enumerate(said)]
  if wrong:
    found.append(Finding("processes", f"{', '.join(wrong)} have different versions than process 0", is_fault=True))
  return found


def _mesh(mesh: MeshSizes) -> Finding:
  try:
    made = mesh.mesh()
  except UserError as error:
    return Finding("mesh", str(error), is_fault=True)
  sizes = ", ".join(f"{name} {size}" for name, size in made.shape.items() if size > 1)
  return Finding("mesh", f"{sizes} over {jax.device_count()} devices" if sizes else "one device")


def _backends(packed: bool) -> str:
  """The attention backend that `auto` chooses for a long bfloat16 prompt, and why not the others."""
  said: list[str] = []

  def choose(q: jax.Array, segments: jax.Array) -> jax.Array:
    rows, spec = ops.Rows(segments=segments if packed else None), ops.AttentionSpec()
    place = jax.local_devices()[0].platform
    said.append(ops.choose_backend("auto", q, q, rows, spec, place))
    for name, backend in ops.backends.items():
      if (reason := backend.refusal(place, q, rows, spec)) is not None:
        said.append(f"not {name}: {reason}")
    return q

  jax.eval_shape(
    choose, jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4096), "int32")
  )
  return "; ".join(said)


def _storage(path: Path) -> Finding:
  """Whether a folder, or the nearest one above it that exists, can be written."""
  if is_remote(path := as_path(path)):
    try:
      check_writable(probe := path / "any")
    except UserError as error:
      # The user only knows the folder.
      said = str(error).removeprefix(f"{probe} ").replace(f" {probe}", "")
      return Finding(f"storage {path}", said, is_fault=True)
    return Finding(f"storage {path}", "can be written")
  above = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
  try:
    with tempfile.NamedTemporaryFile(dir=above):
      free = os.statvfs(above)
  except OSError as error:
    return Finding(f"storage {path}", f"cannot be written: {error.strerror or error}", is_fault=True)
  state = "can be written" if above == path else f"does not exist yet, and can be made in {above}"
  return Finding(f"storage {path}", f"{state}, {free.f_bavail * free.f_frsize / 1e9:,.0f} GB free")
