"""The rotary embedding in a ``config.json``: both formats, and all scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.family import Family
from sa_jax.formats.reader import Config, ConfigReader, Fields
from sa_jax.ops.rope import RopeConfig

_FULL, _LOCAL = "full_attention", "sliding_attention"
_FRACTION, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
_OLDER_KINDS = {"su": "longrope", "mrope": "default"}
_INERT = frozenset(
  # keys of other scalings
  f"""
  factor alpha low_freq_factor high_freq_factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim
  short_factor long_factor max_position_embeddings {_ORIGINAL} {_FRACTION}
  """
  # A training note, another code's name for attention_factor, and the layout of images.
  """
  finetuned attn_factor mrope_section mrope_interleaved
  """.split()
)


class _Sizes(NamedTuple):
  head_dim: int
  max_length: int


def read(reader: ConfigReader, family: Family, head_dim: int, max_length: int) -> tuple[RopeConfig, RopeConfig | None]:
  """The rotary embeddings of global and local layers; None for the latter if they have no separate one."""
  sizes = _Sizes(head_dim, max_length)
  theta = reader.number("rope_theta", 10_000.0)
  scaling, parameters = reader.take("rope_scaling"), reader.take("rope_parameters", {})
  for key, value in (("rope_scaling", scaling or {}), ("rope_parameters", parameters)):
    if not isinstance(value, Mapping):
      reader.fail(key, "must be an object or null")
      return RopeConfig(), None
  if "rope_theta" in parameters and reader.take("rope_theta") not in (
    None,
    parameters["rope_theta"],
    family.defaults.get("rope_theta"),
  ):
    reader.fail(
      "rope_theta", f"conflicts with rope_parameters.rope_theta = {parameters['rope_theta']!r}; keep one of them"
    )
  # Two values may be next to the scaling instead of inside it.
  outer = {"rope_theta": theta} | {
    key: value for key in (_FRACTION, _ORIGINAL) if (value := reader.take(key)) is not None
  }
  if family.local_rope in ("own", "unscaled"):
    return _read_both(reader, family, sizes, outer | dict(scaling or {}))
  if scaling and parameters and dict(scaling) != dict(parameters):
    reader.fail("rope_scaling", "conflicts with rope_parameters; keep one of them")
  values = outer | dict(scaling or {}) | dict(parameters)
  rope = _read_one(reader.inner(values, "rope_parameters."), family, sizes)
  if rope.rotated(head_dim) % 2:
    reader.fail("head_dim", f"rotary embedding needs an even number of dimensions, not {rope.rotated(head_dim)}")
  still = RopeConfig(scaling="none", fraction=rope.fraction, interleaved=rope.interleaved)
  match family.local_rope:
    case "without":
      return rope, still
    case "alone" if reader.take("sliding_window") is not None:
      return still, rope
  return rope, None


def _read_both(reader: ConfigReader, family: Family, sizes: _Sizes, values: Config) -> tuple[RopeConfig, RopeConfig]:
  """For families with separate objects for global and local layers; ``values`` come from an older config."""
  parameters = reader.take("rope_parameters", {})
  theta = values["rope_theta"]
  if family.local_rope == "own":
    theta = reader.number("rope_local_base_freq", 10_000.0)
  if unknown := sorted(set(parameters) - {_FULL, _LOCAL}):
    reader.fail("rope_parameters", f"has unknown keys {unknown}; known are {_FULL} and {_LOCAL}")
  ropes = []
  for name, older in ((_FULL, values), (_LOCAL, {"rope_theta": theta})):
    inner = parameters.get(name) or {}
    if not isinstance(inner, Mapping):
      reader.fail("rope_parameters", f"{name} must be an object")
      inner = {}
    ropes.append(_read_one(reader.inner({**older, **inner}, f"rope_parameters.{name}."), family, sizes))
  return ropes[0], ropes[1]


def _read_one(reader: ConfigReader, family: Family, sizes: _Sizes) -> RopeConfig:
  theta = reader.number("rope_theta")
  given = reader.either("rope_type", "type", "default")
  kind: Any = _OLDER_KINDS.get(given, given) if isinstance(given, str) else given
  fields: Fields = {"interleaved": family.interleaved, "fraction": _fraction(reader, family, kind)}
  rotated = int(sizes.head_dim * fields["fraction"])
  if kind not in family.ropes:
    name = "rope_type" if reader.take("rope_type") else "type"
    reader.fail(name, f"not implemented for this family; must be {' or '.join(map(repr, family.ropes))}")
    return RopeConfig(theta)
  if kind == "dynamic" and "alpha" in reader.values and family.fixed_stretch:
    theta *= reader.number("alpha") ** (sizes.head_dim / (sizes.head_dim - 2))
    kind = "default"
  match kind:
    case "linear":
      fields["factor"] = reader.number("factor")
    case "dynamic":
      fields |= {"factor": reader.number("factor"), "original_max_length": _original(reader, sizes)}
      if fields["original_max_length"] != sizes.max_length:
        reader.fail(_ORIGINAL, f"dynamic scaling starts at max_position_embeddings = {sizes.max_length}")
    case "llama3":
      fields |= _llama3(reader, sizes)
    case "yarn":
      fields |= _yarn(reader, sizes)
    case "longrope":
      fields |= _longrope(reader, sizes, rotated // 2)
  if family.grows_queries:
    fields["query_growth"] = reader.optional_number("llama_4_scaling_beta") or 0.0
    fields["original_max_length"] = _original(reader, sizes)
  reader.finish(_INERT)
  return RopeConfig(theta, kind, **fields)


def _fraction(reader: ConfigReader, family: Family, kind: str) -> float:
  """The rotated fraction of a head. transformers' scalings read it even if the family's code does not."""
  if _FRACTION not in family.defaults and kind == "default":
    return 1.0
  fraction = reader.number(_FRACTION, 1.0)
  if fraction > 1:
    reader.fail(_FRACTION, "must be a number above 0 and at most 1")
    return 1.0
  if _FRACTION not in family.defaults and fraction != 1:
    reader.fail(_FRACTION, "partial rotary embedding is not implemented for this family")
    return 1.0
  return fraction


def _original(reader: ConfigReader, sizes: _Sizes) -> int:
  return reader.integer(_ORIGINAL, sizes.max_length)


def _llama3(reader: ConfigReader, sizes: _Sizes) -> Fields:
  low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
  if high <= low:
    reader.fail("high_freq_factor", f"it must be greater than low_freq_factor = {low}")
  stretch = {"factor": reader.number("factor"), "original_max_length": _original(reader, sizes)}
  return stretch | {"low_freq_factor": low, "high_freq_factor": high}


def _yarn(reader: ConfigReader, sizes: _Sizes) -> Fields:
  original = _original(reader, sizes)
  # may be null, but not absent
  given = reader.optional_number("factor") if "factor" in reader.values else reader.number("factor")
  factor = given or sizes.max_length / original
  fast, slow = reader.number("beta_fast", 32.0), reader.number("beta_slow", 1.0)
  if fast <= slow:
    reader.fail("beta_fast", f"it must be greater than beta_slow = {slow}")
  return {
    "factor": factor,
    "original_max_length": original,
    "beta_fast": fast,
    "beta_slow": slow,
    "truncate": reader.flag("truncate", True),
    "attention_factor": _yarn_magnitude(reader, factor),
  }


def _yarn_magnitude(reader: ConfigReader, factor: float) -> float | None:
  """The factor on q and k: explicit, or a quotient of two as in DeepSeek's configs, or None for the paper's."""
  given = reader.optional_number("attention_factor")
  mscale, mscale_all_dim = reader.optional_number("mscale"), reader.optional_number("mscale_all_dim")
  if given is not None or mscale is None or mscale_all_dim is None or factor <= 1:
    return given
  of = lambda scale: 0.1 * scale * math.log(factor) + 1.0
  return of(mscale) / of(mscale_all_dim)


def _longrope(reader: ConfigReader, sizes: _Sizes, planes: int) -> Fields:
  original = _original(reader, sizes)
  return {
    "factor": reader.optional_number("factor") or sizes.max_length / original,
    "original_max_length": original,
    "attention_factor": reader.optional_number("attention_factor"),
    "short_factors": tuple(reader.numbers("short_factor", planes)),
    "long_factors": tuple(reader.numbers("long_factor", planes)),
  }


def write(config: ModelConfig, family: Family, spelling: Literal["v4", "v5"]) -> Fields:
  """The keys of a ``config.json`` that `read` reads."""
  rope = config.rope
  if family.local_rope == "alone" and config.local_rope is not None:
    rope = config.local_rope
  if rope is None:
    raise UserError(f"a config.json of {config.family!r} has a rotary embedding, but this model has none (rope=None)")
  scaling = _scaling(rope, config.max_length)
  beside: Fields = {}
  if _ORIGINAL in family.defaults:
    beside[_ORIGINAL] = rope.original_max_length if rope.scaling == "longrope" else config.max_length
  if _FRACTION in family.defaults:
    (scaling if spelling == "v5" else beside)[_FRACTION] = rope.fraction
  older = {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "default" else scaling}
  if family.local_rope in ("own", "unscaled"):
    local = rope if config.local_rope is None else config.local_rope
    if spelling == "v5" or local.scaling != "default":
      full = {"rope_theta": rope.theta, **scaling}
      return {"rope_parameters": {_FULL: full, _LOCAL: {"rope_theta": local.theta, **_scaling(local, 0)}}}
    return older | ({"rope_local_base_freq": local.theta} if family.local_rope == "own" else {})
  if spelling == "v5" or rope.query_growth:
    return {"rope_parameters": {"rope_theta": rope.theta, **scaling}} | beside
  return older | beside


def _scaling(rope: RopeConfig, max_length: int) -> Fields:
  values: Fields = {"rope_type": rope.scaling}
  if rope.scaling in ("linear", "dynamic", "llama3", "yarn"):
    values["factor"] = rope.factor
  if rope.scaling in ("dynamic", "yarn", "llama3", "longrope") or rope.query_growth:
    values[_ORIGINAL] = rope.original_max_length
  match rope.scaling:
    case "llama3":
      values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    case "yarn":
      values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    case "longrope":
      values |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
      if rope.factor != max_length / rope.original_max_length:
        values["factor"] = rope.factor
  if rope.attention_factor is not None:
    values["attention_factor"] = rope.attention_factor
  if rope.query_growth:
    values["llama_4_scaling_beta"] = rope.query_growth
  return values
