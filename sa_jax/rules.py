"""Rules: which mesh axes split which logical axes."""

from __future__ import annotations

import itertools

from jax.sharding import AbstractMesh, AxisType, Mesh

from sa_jax.errors import UserError
from sa_jax.nn.axes import mesh_axes_of

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
  ("batch", ("slice", "data", "fsdp", "expert")),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("vector", None),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("experts", "expert"),
  ("scores", None),
  ("vocab", "tensor"),
  ("groups", None),
  ("followers", None),
)
"""Logical axis → mesh axis, for the axes of `make_mesh`. Mesh axes that a mesh does not have are ignored."""

_OF_ATTENTION = ("batch", "length", "heads", "kv_heads")


def check_mesh(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> None:
  """Checks that the rules can shard arrays over a mesh.

  Raises:
    UserError: if an axis is not of type ``Auto``, no rule names any axis of the mesh, or one axis is to split both rows
      and attention heads.
  """
  if explicit := [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]:
    raise UserError(
      f"the mesh's axes {', '.join(explicit)} are not jax.sharding.AxisType.Auto: create it with "
      "sa_jax.sharding.make_mesh, or "
      f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
    )
  active, idle = [name for name in mesh.axis_names if mesh.shape[name] > 1], idle_axes(mesh, rules)
  if idle and idle == active:
    raise UserError(
      f"no rule names an axis of this mesh: it has {', '.join(idle)}, the rules name "
      f"{', '.join(sorted(_named(rules)))}; rename its axes, or pass rules="
    )
  by_axis = dict(reversed(rules))
  over = {name: [axis for axis in mesh_axes_of(by_axis.get(name)) if axis in active] for name in _OF_ATTENTION}
  if twice := [
    f"{axis!r} for {rows} and {heads}"
    for rows, heads in itertools.product(("batch", "length"), ("heads", "kv_heads"))
    for axis in over[rows]
    if axis in over[heads]
  ]:
    raise UserError.of("rules", [f"they name the mesh axis {each}: split only one of them over it" for each in twice])


def idle_axes(mesh: Mesh | AbstractMesh, rules: Rules) -> list[str]:
  """The mesh axes that no rule names."""
  return [name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in _named(rules)]


def _named(rules: Rules) -> set[str]:
  return {axis for _, entry in rules for axis in mesh_axes_of(entry)}


def rules_on(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> Rules:
  """The rules without mesh axes that the mesh does not have.

  Raises:
    UserError: see `check_mesh`.
  """
  check_mesh(mesh, rules)

  def axes(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
      return tuple(axis for axis in entry if axis in mesh.shape) or None
    return entry if entry in mesh.shape else None

  return tuple((logical, axes(entry)) for logical, entry in rules)
