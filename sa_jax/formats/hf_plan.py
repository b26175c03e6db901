"""The plan and value size of a model, in ``config.json``'s ``shared_attention``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.families import FAMILIES
from sa_jax.formats.family import Family
from sa_jax.formats.reader import Config, ConfigReader, Fields
from sa_jax.plan import SharingPlan, as_plan

SHARED = "shared_"
"""Prefix of the family's name in the ``model_type`` of an exported plan."""
_INTERLEAVED = "this family's files have values between queries and keys: they cannot be narrower"


def read_plan(values: Config, num_layers: int) -> SharingPlan:
  """The plan in a ``config.json``'s ``shared_attention``; dense if the key is absent.

  Raises:
    UserError: if it is malformed, or not a plan for a model of this depth.
  """
  shared = values.get("shared_attention")
  if shared is None:
    return SharingPlan.dense(num_layers)
  source = shared.get("source") if isinstance(shared, Mapping) else None
  if not _integers(source):
    raise UserError('config.json: shared_attention must be {"source": [one layer index per layer]}')
  if unknown := sorted(set(shared) - {"source", "head_map", "value_dim"}):
    raise UserError(f"config.json: shared_attention has unknown keys {unknown}")
  plan = as_plan(source, num_layers)
  head_map = shared.get("head_map")
  if head_map is None:
    return plan
  if not isinstance(head_map, list) or not all(entry is None or _integers(entry) for entry in head_map):
    raise UserError(
      "config.json: shared_attention's head_map must be a list with null or a list of heads for each layer"
    )
  return SharingPlan(plan.source, tuple(entry and tuple(entry) for entry in head_map))


def read_value_dim(reader: ConfigReader, family: Family) -> int | None:
  """The size of values, if the plan's entry makes them narrower than keys."""
  shared = reader.values.get("shared_attention")
  value_dim = shared.get("value_dim") if isinstance(shared, Mapping) else None
  if value_dim is None:
    return None
  if isinstance(value_dim, bool) or not isinstance(value_dim, int) or value_dim < 1:
    reader.fail("shared_attention", f"its value_dim is {value_dim!r}; must be a positive integer")
    return None
  if family.interleaves_values:
    reader.fail("shared_attention", _INTERLEAVED)
  return value_dim


def check_can_narrow(config: ModelConfig) -> None:
  """Checks, before any work, that a checkpoint of the model can have values narrower than keys.

  Raises:
    UserError: if it cannot.
  """
  if FAMILIES[config.family].interleaves_values:
    raise UserError(f"{config.family}: {_INTERLEAVED}. Keep their size, and share attention or quantise the cache")


def write_plan(plan: SharingPlan, config: ModelConfig | None = None) -> Fields:
  """The ``shared_attention`` of a ``config.json``: the plan as `read_plan` reads it, and the config's value size."""
  values: Fields = {"source": list(plan.source)}
  if config is not None and config.value_dim is not None:
    values["value_dim"] = config.value_dim
  if plan.head_map is not None:
    values["head_map"] = [entry if entry is None else list(entry) for entry in plan.head_map]
  return values


def is_plain(config: ModelConfig, plan: SharingPlan) -> bool:
  """Whether the family's own class can run the model: no followers, and values as wide as keys."""
  return not plan.followers and config.value_width == config.head_dim


def _integers(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, int) for item in value)
