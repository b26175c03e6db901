"""The rotary embedding in a ``config.json``: both spellings, and all the scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.families import Family
from sa_jax.formats.reader import ConfigReader
from sa_jax.ops.rope import RopeConfig

_FULL, _LOCAL = "full_attention", "sliding_attention"


def read(reader: ConfigReader, family: Family, max_length: int) -> tuple[RopeConfig, RopeConfig | None]:
  """The rotary embeddings of global and of local layers, the latter None where they have none of their own."""
  theta = reader.number("rope_theta", 10_000.0)
  scaling, parameters = reader.take("rope_scaling"), reader.take("rope_parameters", {})
  for key, value in (("rope_scaling", scaling or {}), ("rope_parameters", parameters)):
    if not isinstance(value, Mapping):
      reader.fail(key, "an object or null is needed")
      return RopeConfig(), None
  if "rope_theta" in parameters and reader.take("rope_theta", parameters["rope_theta"]) != parameters["rope_theta"]:
    reader.fail("rope_theta", f"rope_parameters.rope_theta says {parameters['rope_theta']!r}; keep one of them")
  if not family.local_rope:
    if scaling and parameters and dict(scaling) != dict(parameters):
      reader.fail("rope_scaling", "it says something other than rope_parameters does; keep one of them")
    values = dict(scaling or {}) | dict(parameters)
    return _read_one(reader, values, "rope_parameters.", theta, family, max_length), None
  local_theta = reader.number("rope_local_base_freq", 10_000.0)
  if unknown := sorted(set(parameters) - {_FULL, _LOCAL}):
    reader.fail("rope_parameters", f"it has {unknown}, where {_FULL} and {_LOCAL} are known")
  ropes = []
  for name, base, extra in ((_FULL, theta, scaling or {}), (_LOCAL, local_theta, {})):
    inner = parameters.get(name) or {}
    if not isinstance(inner, Mapping):
      reader.fail("rope_parameters", f"{name} must be an object")
      inner = {}
    ropes.append(_read_one(reader, {**extra, **inner}, f"rope_parameters.{name}.", base, family, max_length))
  return ropes[0], ropes[1]


def _read_one(
  outer: ConfigReader, values: Mapping[str, Any], prefix: str, theta: float, family: Family, max_length: int
) -> RopeConfig:
  reader = ConfigReader(values, outer.errors, prefix)
  theta = reader.number("rope_theta", theta)
  kind = reader.either("rope_type", "type", "default")
  reader.choice("partial_rotary_factor", (1, 1.0), 1.0)
  if kind not in family.ropes:
    given = "rope_type" if reader.take("rope_type") else "type"
    reader.fail(given, f"not implemented for this family; {' or '.join(map(repr, family.ropes))} is")
    return RopeConfig(theta)
  fields: dict[str, Any] = {}
  if kind != "default":
    fields["factor"] = reader.number("factor")
  if kind in ("dynamic", "yarn", "llama3"):
    fields["original_max_length"] = reader.integer("original_max_position_embeddings", max_length)
  if kind == "dynamic" and fields["original_max_length"] != max_length:
    reader.fail("original_max_position_embeddings", f"dynamic scaling starts at max_position_embeddings = {max_length}")
  if kind == "llama3":
    low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
    fields |= {"low_freq_factor": low, "high_freq_factor": high}
    if high <= low:
      reader.fail("high_freq_factor", f"it must be greater than low_freq_factor = {low}")
  if kind == "yarn":
    fields |= {
      "beta_fast": reader.number("beta_fast", 32.0),
      "beta_slow": reader.number("beta_slow", 1.0),
      "truncate": reader.flag("truncate", True),
      "attention_factor": _yarn_magnitude(reader, fields["factor"]),
    }
    if fields["beta_fast"] <= fields["beta_slow"]:
      reader.fail("beta_fast", f"it must be greater than beta_slow = {fields['beta_slow']}")
  reader.finish()
  return RopeConfig(theta, kind, **fields)


def _yarn_magnitude(reader: ConfigReader, factor: float) -> float | None:
  """The factor on q and k: given, or a quotient of two that DeepSeek's configs give, or None for the paper's."""
  given = reader.optional_number("attention_factor")
  mscale, mscale_all_dim = reader.optional_number("mscale"), reader.optional_number("mscale_all_dim")
  if given is not None or mscale is None or mscale_all_dim is None or factor <= 1:
    return given
  of = lambda scale: 0.1 * scale * math.log(factor) + 1.0
  return of(mscale) / of(mscale_all_dim)


def write(config: ModelConfig, family: Family, spelling: Literal["v4", "v5"]) -> dict[str, Any]:
  """The keys of a ``config.json`` that `read` reads."""
  if (rope := config.rope) is None:
    raise UserError(f"a config.json of {config.family!r} has a rotary embedding, and this model has none (rope=None)")
  scaling = _scaling(rope)
  if not family.local_rope:
    if spelling == "v5":
      return {"rope_parameters": {"rope_theta": rope.theta, **scaling}}
    return {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "default" else scaling}
  local = rope if config.local_rope is None else config.local_rope
  if spelling == "v5" or local.scaling != "default":
    full = {"rope_theta": rope.theta, **scaling}
    return {"rope_parameters": {_FULL: full, _LOCAL: {"rope_theta": local.theta, **_scaling(local)}}}
  return {
    "rope_theta": rope.theta,
    "rope_scaling": None if rope.scaling == "default" else scaling,
    "rope_local_base_freq": local.theta,
  }


def _scaling(rope: RopeConfig) -> dict[str, Any]:
  values: dict[str, Any] = {"rope_type": rope.scaling}
  if rope.scaling != "default":
    values["factor"] = rope.factor
  if rope.scaling in ("dynamic", "yarn", "llama3"):
    values["original_max_position_embeddings"] = rope.original_max_length
  if rope.scaling == "llama3":
    values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if rope.scaling == "yarn":
    values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.attention_factor is not None:
      values["attention_factor"] = rope.attention_factor
  return values
