"""`ModelConfig` from and to Hugging Face's ``config.json``, in the formats of transformers 4 and transformers 5."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from sa_jax.config import Architecture, ModelConfig
from sa_jax.errors import UserError, near
from sa_jax.formats import hf_experts, hf_plan, hf_rope, quantised
from sa_jax.formats.families import FAMILIES
from sa_jax.formats.family import Family, KeyKind
from sa_jax.formats.hf_keys import FIXED, INERT
from sa_jax.formats.hf_text import refusal, text_part
from sa_jax.formats.reader import Config, ConfigReader, Fields
from sa_jax.plan import SharingPlan

_LOG = logging.getLogger("sa_jax")

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
}
_MOST_LAYERS = 10_000

_LOCAL_KINDS = {"full_attention": False, "attention": False, "sliding_attention": True}

DTYPES = ("float32", "bfloat16", "float16")
"""Floating-point dtypes of parameters."""


def read(values: Config, strict: bool = False) -> ModelConfig:
  """Reads the contents of a ``config.json``.

  Both formats are supported: ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` (transformers 4), and
  ``rope_parameters`` and ``dtype`` (transformers 5). The compute and parameter dtypes are the checkpoint's.

  Args:
    values: the contents.
    strict: whether unknown keys are errors; otherwise a warning lists them.

  Raises:
    UserError: lists all values that are missing, malformed or not implemented.
  """
  part = text_part(values)
  if part is not values:
    _LOG.warning(
      "a %s has parts besides its language model; only the language model is read, as a %s",
      values.get("model_type"),
      part.get("model_type"),
    )
  values = _of_family(part)
  family = family_of(values)
  reader = _reader(values, family)
  sizes = _read_sizes(reader)
  eos = reader.take("eos_token_id", () if "eos_token_id" in reader.values else 2)
  eos = (eos,) if isinstance(eos, int) else eos
  if not isinstance(eos, list | tuple) or not all(isinstance(token, int) for token in eos):
    reader.fail("eos_token_id", "must be a token id, a list of token ids or null")
    eos = ()
  dtype = str(reader.either("dtype", "torch_dtype", "float32")).removeprefix("torch.")
  if dtype not in DTYPES:
    reader.fail("dtype" if "dtype" in values else "torch_dtype", f"must be one of {', '.join(DTYPES)}")
  for key, allowed in {**FIXED, **family.fixed}.items():
    reader.fixed(key, allowed)
  for key in ("quantization_config", "quantization"):
    if (fault := quantised.fault_of(reader.take(key))) is not None:
      reader.fail(key, fault)
  for key, why in family.required.items():
    if reader.values.get(key) is None:
      reader.fail(key, why)
  rope, local_rope = hf_rope.read(reader, family, sizes["head_dim"], sizes["max_length"])
  config = {
    **sizes,
    **{name: value(sizes) if callable(value) else value for name, value in family.fields.items()},
    **_read_keys(reader, family, sizes),
    **_read_window(reader, family, sizes["num_layers"]),
    "experts": hf_experts.read(reader, family.experts),
    "value_dim": hf_plan.read_value_dim(reader, family),
    "norm_eps": reader.number("rms_norm_eps", 1e-6),
    "rope": rope,
    "local_rope": local_rope,
    "activation": family.activations[reader.choice(family.activation, tuple(family.activations), "silu")],
    "tie_embeddings": reader.flag("tie_word_embeddings", False),
    "family": values["model_type"],
    "bos_token_id": reader.token("bos_token_id", absent=1),
    "eos_token_ids": tuple(eos),
    "pad_token_id": reader.token("pad_token_id", absent=None),
    "dtype": dtype,
    "param_dtype": dtype,
  }
  reader.finish(INERT | family.inert | family.defaults.keys())
  _report(reader, strict)
  return ModelConfig(**config)


def _of_family(values: Config) -> Config:
  """Replaces the model type of an exported plan by its family's."""
  model_type = values.get("model_type")
  if "shared_attention" in values and isinstance(model_type, str):
    return {**values, "model_type": model_type.removeprefix(hf_plan.SHARED)}
  return values


def _report(reader: ConfigReader, strict: bool) -> None:
  """Raises the errors found, and warns of unknown keys."""
  unknown = [f"{each}: this key is not known; remove it if it has no effect" for each in reader.unknown]
  if faults := reader.errors + (unknown if strict else []):
    raise UserError("\n  ".join(("config.json cannot be used:", *faults)))
  if reader.unknown:
    _LOG.warning("config.json has unknown keys, which are assumed to have no effect: %s", ", ".join(reader.unknown))


def family_of(values: Config) -> Family:
  """The family of a model.

  Raises:
    UserError: if the family is unknown; says why.
  """
  values = _of_family(text_part(values))
  model_type = values.get("model_type")
  if isinstance(model_type, str) and model_type in FAMILIES:
    return FAMILIES[model_type]
  if (reason := refusal(values)) is not None:
    raise UserError(f"model_type {model_type!r} is not supported: {reason}")
  supported = ", ".join(FAMILIES)
  if any("experts" in key for key in values):
    mixtures = ", ".join(name for name, family in FAMILIES.items() if family.experts)
    raise UserError(
      f"model_type {model_type!r} is an unsupported kind of mixture of experts; supported are: {mixtures}"
    )
  if values.get("is_encoder_decoder") or not any("CausalLM" in str(name) for name in values.get("architectures") or ()):
    raise UserError(
      f"model_type {model_type!r} is not known to be a decoder-only language model; supported are: {supported}"
    )
  raise UserError(f"model_type {model_type!r} is not supported; supported are: {supported}")


def _read_sizes(reader: ConfigReader) -> dict[str, int]:
  sizes = {ours: reader.integer(theirs) for theirs, ours in _SIZES.items()}
  if sizes["num_layers"] > _MOST_LAYERS:
    reader.fail("num_hidden_layers", f"must be at most {_MOST_LAYERS}")
    sizes["num_layers"] = 1
  num_kv_heads = reader.integer("num_key_value_heads", sizes["num_heads"])
  if sizes["num_heads"] % num_kv_heads:
    reader.fail("num_key_value_heads", f"num_attention_heads = {sizes['num_heads']} must be a multiple of it")
  if reader.values.get("head_dim") is None and sizes["embed_dim"] % sizes["num_heads"]:
    reader.fail("hidden_size", f"without head_dim it must be a multiple of num_attention_heads = {sizes['num_heads']}")
  head_dim = reader.integer("head_dim", max(sizes["embed_dim"] // sizes["num_heads"], 1))
  max_length = reader.integer("max_position_embeddings", 2048)
  return sizes | {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_length": max_length}


def _reader(values: Config, family: Family) -> ConfigReader:
  """A reader of the usual keys, with the family's names for them."""
  values = hf_experts.usual(values, family.experts)
  if family.spelling is not None:
    values = family.spelling.usual(values)
  spelled = {usual: own for own, usual in family.aliases.items() if own in values}
  reader = ConfigReader({**family.defaults, **{family.aliases.get(key, key): values[key] for key in values}}, spelled)
  for usual, own in spelled.items():
    if usual in values and values[usual] != values[own]:
      reader.fail(usual, f"conflicts with {usual} = {values[usual]!r}; keep one of them")
  return reader


def _read_keys(reader: ConfigReader, family: Family, sizes: Mapping[str, int]) -> Fields:
  """The fields from keys that only some families have."""
  fields: Fields = {}
  for key in family.keys:
    if key.kind == "flag":
      value: bool | float | None = reader.flag(key.name, False)
    elif (value := reader.optional_number(key.name)) is not None:
      value = _to_ours(value, key.kind, sizes)
    else:
      continue
    fields |= dict.fromkeys(key.fields, value)
  return fields


def _to_ours(value: float, kind: KeyKind, sizes: Mapping[str, int]) -> float:
  match kind:
    case "inverse":
      return 1 / value
    case "inverse_root":
      return value**-0.5
    case "over_root_depth":
      return value / math.sqrt(sizes["num_layers"])
    case "over_width":
      return value / sizes["embed_dim"]
  return value


def _to_theirs(value: float, kind: KeyKind, config: ModelConfig) -> float:
  match kind:
    case "inverse":
      return _tidy(1 / value)
    case "inverse_root":
      return _whole(value**-2)
    case "over_root_depth":
      return _tidy(value * math.sqrt(config.num_layers))
    case "over_width":
      return _whole(value * config.embed_dim)
  return value


def _read_window(reader: ConfigReader, family: Family, num_layers: int) -> Fields:
  """Which layers are local, and their window."""
  if family.local_rope == "without":
    return {"local_layers": _without_rope(reader, num_layers)}
  if not family.window:
    return {}
  switched_on = family.window != "optional" or reader.flag("use_sliding_window", False)
  window = None if reader.take("sliding_window") is None else reader.integer("sliding_window")
  if family.window == "all":
    return {"window": window, "local_layers": () if window is None else tuple(range(num_layers))}
  types = reader.take("layer_types")
  for key in ("max_window_layers", "sliding_window_pattern"):
    if key in family.defaults and types is None and window is not None:
      reader.integer(key)
  if types is None:
    local = family.is_local or (lambda values, layer: False)
    pattern = [bool(not reader.errors and local(reader.values, layer)) for layer in range(num_layers)]
  elif _are_kinds(types, num_layers):
    pattern = [_LOCAL_KINDS[kind] for kind in types]
  else:
    reader.fail("layer_types", f"must be a list of {num_layers} names, each {' or '.join(_LOCAL_KINDS)}")
    return {}
  if not switched_on or family.window == "none":
    if types is not None and any(pattern):
      reader.fail("layer_types", "has sliding_attention, but use_sliding_window is false")
    return {}
  if window is None and any(pattern):
    reader.fail("sliding_window", "layers with sliding_attention need a number of tokens")
    return {}
  return {"window": window, "local_layers": tuple(layer for layer, local in enumerate(pattern) if local)}


def _are_kinds(types: Any, num_layers: int) -> bool:
  return (
    isinstance(types, list)
    and len(types) == num_layers
    and all(isinstance(kind, str) and kind in _LOCAL_KINDS for kind in types)
  )


def _without_rope(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
  """The layers without RoPE."""
  every, flags = reader.integer("no_rope_layer_interval", 4), reader.take("no_rope_layers")
  if flags is None:
    return tuple(range(every - 1, num_layers, every))
  if not isinstance(flags, list) or len(flags) != num_layers or not all(flag in (0, 1) for flag in flags):
    reader.fail("no_rope_layers", f"must be a list of {num_layers} numbers, 1 for a layer with rotary embedding")
    return ()
  return tuple(layer for layer, rotates in enumerate(flags) if not rotates)


def write(config: ModelConfig, spelling: Literal["v4", "v5"] = "v5") -> Fields:
  """The contents of a ``config.json`` for transformers and `read`.

  Args:
    config: the model.
    spelling: ``v5`` writes ``rope_parameters`` and ``dtype`` (transformers 5); ``v4`` writes ``rope_theta``,
      ``rope_scaling`` and ``torch_dtype``.

  Raises:
    UserError: if the family is unknown, or its ``config.json`` cannot describe the model.
  """
  if (family := FAMILIES.get(config.family)) is None:
    raise UserError(
      f"cannot write a config.json of the unknown family {config.family!r}{near(config.family, FAMILIES)}"
    )
  activations = {ours: theirs for theirs, ours in family.activations.items()}
  eos = config.eos_token_ids
  values = {
    "architectures": [family.architecture],
    "model_type": config.family,
    **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    family.activation: activations[config.activation],
    **_write_keys(config, family),
    **hf_experts.write(config, family.experts),
    **_write_window(config, family),
    "bos_token_id": config.bos_token_id,
    "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    "pad_token_id": config.pad_token_id,
    **hf_rope.write(config, family, spelling),
    "dtype" if spelling == "v5" else "torch_dtype": config.param_dtype,
  }
  if config.value_dim is not None:
    values["shared_attention"] = hf_plan.write_plan(SharingPlan.dense(config.num_layers), config)
  own = {usual: own for own, usual in family.aliases.items()}
  if family.spelling is not None:
    values = family.spelling.own(values)
  values = {own.get(key, key): value for key, value in values.items()}
  _check_written(config, values)
  return values


def _write_keys(config: ModelConfig, family: Family) -> Fields:
  values: Fields = {}
  for key in family.keys:
    value = getattr(config, key.fields[0])
    if key.fields == ("attention_scale",) and value is None:
      value = config.head_dim**-0.5
    values[key.name] = value if key.kind == "flag" or value is None else _to_theirs(value, key.kind, config)
  return values


def _write_window(config: ModelConfig, family: Family) -> Fields:
  if family.local_rope == "without":
    return {"no_rope_layers": [int(layer not in config.local_layers) for layer in range(config.num_layers)]}
  match family.window:
    case "":
      return {}
    case "all":
      return {"sliding_window": config.window}
  names = {False: "full_attention", True: "sliding_attention"}
  types = [names[layer in config.local_layers] for layer in range(config.num_layers)]
  values = {"sliding_window": config.window, "layer_types": types}
  return values | ({"use_sliding_window": bool(config.local_layers)} if family.window == "optional" else {})


def _check_written(config: ModelConfig, values: Config) -> None:
  """Checks that the family's config can describe the model completely.

  Raises:
    UserError: names each field that a reader of ``values`` would get wrong.
  """
  back = read(values)
  ours = [field.name for field in dataclasses.fields(Architecture)]
  fields = [name for name in ours if getattr(config, name) != getattr(back, name)]
  if "window" in fields and not config.local_layers:
    fields.remove("window")  # no effect without local layers
  if wrong := [f"{field}={getattr(config, field)!r} (it has {getattr(back, field)!r})" for field in fields]:
    raise UserError(f"a {config.family} config.json cannot describe this model: {'; '.join(wrong)}")


def _tidy(value: float) -> float:
  """Rounds a number to few digits if the difference is rounding error."""
  return float(f"{value:.12g}")


def _whole(value: float) -> int | float:
  """The same, as an integer if it is whole."""
  short = _tidy(value)
  return round(short) if short == round(short) else short
