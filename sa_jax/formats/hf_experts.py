"""Experts from and to Hugging Face's ``config.json``."""

from __future__ import annotations

from sa_jax.config import ModelConfig
from sa_jax.formats.family import ExpertKeys
from sa_jax.formats.reader import Config, ConfigReader, Fields
from sa_jax.ops import Experts

_CHOSEN = "num_experts_per_tok"


_NUMBERS = ("num_experts", "num_local_experts")  # transformers reads either in most families


def usual(values: Config, keys: ExpertKeys | None) -> Config:
  """The config with the number of experts under the family's key, if it has only the other key, or both are equal."""
  if keys is None:
    return values
  (other,) = set(_NUMBERS) - {keys.number}
  if values.get(other) is None or values.get(keys.number, values[other]) not in (None, values[other]):
    return values
  return {keys.number: values[other]} | {key: value for key, value in values.items() if key not in _NUMBERS}


def read(reader: ConfigReader, keys: ExpertKeys | None) -> Experts | None:
  """The experts in a config; None for a family with a single MLP."""
  if keys is None:
    return None
  count, chosen = reader.integer(keys.number), reader.integer(_CHOSEN)
  for other in _NUMBERS:
    if reader.take(other) not in (None, count):
      reader.fail(other, f"conflicts with {keys.number} = {count}; keep one of them")
  if chosen > count:
    reader.fail(_CHOSEN, f"must be at most {keys.number} = {count}")
    chosen = 1
  normalised = reader.flag(keys.normalised, False) if isinstance(keys.normalised, str) else keys.normalised
  shared = reader.integer(keys.shared) if keys.shared and reader.take(keys.shared) != 0 else 0
  return Experts(count, chosen, normalised, shared, keys.shared_gate and shared > 0)


def write(config: ModelConfig, keys: ExpertKeys | None) -> Fields:
  """The config keys of the experts."""
  experts = config.experts
  if keys is None or experts is None:
    return {}
  values: Fields = {keys.number: experts.count, _CHOSEN: experts.chosen}
  if isinstance(keys.normalised, str):
    values[keys.normalised] = experts.normalised
  return values | ({keys.shared: experts.shared_width} if keys.shared else {})
