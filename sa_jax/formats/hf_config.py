"""`ModelConfig` from and to Hugging Face's ``config.json``, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from sa_jax.config import Architecture, ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats import hf_rope
from sa_jax.formats.families import FAMILIES, QUERY_SCALE, Family
from sa_jax.formats.reader import ConfigReader
from sa_jax.plan import SharingPlan, as_plan

# Keys that change nothing that we compute: provenance, training set-up, and defaults of transformers' own generate.
_INERT = frozenset(
  """
  _name_or_path architectures attn_implementation _attn_implementation auto_map initializer_range is_llama_config
  model_type transformers_version transformers.js_config use_cache unsloth_version unsloth_fixed shared_attention
  return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
  id2label label2id problem_type task_specific_params finetuning_task tokenizer_class prefix return_dict_in_generate
  output_scores max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
  top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
  bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
  begin_suppress_tokens exponential_decay_length_penalty sep_token_id decoder_start_token_id
  tie_encoder_decoder cross_attention_hidden_size
  """.split()
)

# Keys we implement one value of: any other value would change the result.
_FIXED: dict[str, tuple[Any, ...]] = {
  "attention_dropout": (0, 0.0),
  "pretraining_tp": (1,),
  "rope_interleaved": (False,),
  "is_encoder_decoder": (False,),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "pruned_heads": ({}, None),
  "quantization_config": (None,),
  "partial_rotary_factor": (1, 1.0, None),
  "attention_bias": (False,),
  "mlp_bias": (False,),
}

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
}
_MOST_LAYERS = 10_000

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_KINDS = {"full_attention": False, "sliding_attention": True}

DTYPES = ("float32", "bfloat16", "float16")
"""Floating-point types that parameters may have."""


SHARED = "shared_"
"""Before the family's name, in the ``model_type`` of an exported plan."""


def read(values: Mapping[str, Any]) -> ModelConfig:
  """Reads the contents of a ``config.json``.

  Both spellings are understood: ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` (transformers 4), and
  ``rope_parameters`` and ``dtype`` (transformers 5). The compute and parameter dtypes are the checkpoint's.

  Raises:
    UserError: names, all at once, each value that is missing, malformed or not implemented, and each unknown key.
  """
  values = _of_family(values)
  family = _family(values)
  reader = ConfigReader({**family.defaults, **values}, [])
  sizes = _read_sizes(reader)
  eos = reader.take("eos_token_id", () if "eos_token_id" in reader.values else 2)
  eos = (eos,) if isinstance(eos, int) else eos
  if not isinstance(eos, list | tuple) or not all(isinstance(token, int) for token in eos):
    reader.fail("eos_token_id", "a token id, a list of token ids or null is needed")
    eos = ()
  dtype = str(reader.either("dtype", "torch_dtype", "float32")).removeprefix("torch.")
  if dtype not in DTYPES:
    reader.fail("dtype" if "dtype" in values else "torch_dtype", f"one of {', '.join(DTYPES)} is needed")
  for key, allowed in (_FIXED | dict(family.fixed)).items():
    if key not in {read.name for read in family.keys}:
      reader.choice(key, allowed, allowed[0])
  for key, why in family.required.items():
    if values.get(key) is None:
      reader.fail(key, why)
  rope, local_rope = hf_rope.read(reader, family, sizes["max_length"])
  config = {
    **sizes,
    **family.fields,
    **_read_keys(reader, family),
    **_read_window(reader, family, sizes["num_layers"]),
    "norm_eps": reader.number("rms_norm_eps", 1e-6),
    "rope": rope,
    "local_rope": local_rope,
    "activation": _ACTIVATIONS[reader.choice(family.activation, tuple(_ACTIVATIONS), "silu")],
    "tie_embeddings": reader.flag("tie_word_embeddings", False),
    "family": values["model_type"],
    "bos_token_id": reader.token("bos_token_id", absent=1),
    "eos_token_ids": tuple(eos),
    "pad_token_id": reader.token("pad_token_id", absent=None),
    "dtype": dtype,
    "param_dtype": dtype,
  }
  reader.finish(_INERT | family.inert | family.defaults.keys() - values.keys())
  if reader.errors:
    raise UserError("config.json cannot be used:\n  " + "\n  ".join(reader.errors))
  return ModelConfig(**config)


def _of_family(values: Mapping[str, Any]) -> Mapping[str, Any]:
  """With the family's model type in place of that of an exported plan."""
  model_type = values.get("model_type")
  if "shared_attention" in values and isinstance(model_type, str):
    return {**values, "model_type": model_type.removeprefix(SHARED)}
  return values


def _family(values: Mapping[str, Any]) -> Family:
  model_type = values.get("model_type")
  if isinstance(model_type, str) and model_type in FAMILIES:
    return FAMILIES[model_type]
  supported = ", ".join(FAMILIES)
  if any("experts" in key for key in values):
    raise UserError(
      f"model_type {model_type!r} is a mixture of experts, which is not supported; supported: {supported}"
    )
  if values.get("is_encoder_decoder") or not any("CausalLM" in str(name) for name in values.get("architectures") or ()):
    raise UserError(
      f"model_type {model_type!r} is not known as a decoder-only language model, and no other is supported; "
      f"supported are: {supported}"
    )
  raise UserError(f"model_type {model_type!r} is not supported; supported are: {supported}")


def _read_sizes(reader: ConfigReader) -> dict[str, int]:
  sizes = {ours: reader.integer(theirs) for theirs, ours in _SIZES.items()}
  if sizes["num_layers"] > _MOST_LAYERS:
    reader.fail("num_hidden_layers", f"models of more than {_MOST_LAYERS} layers are not believed")
    sizes["num_layers"] = 1
  num_kv_heads = reader.integer("num_key_value_heads", sizes["num_heads"])
  if sizes["num_heads"] % num_kv_heads:
    reader.fail("num_key_value_heads", f"num_attention_heads = {sizes['num_heads']} must be a multiple of it")
  if reader.values.get("head_dim") is None and sizes["embed_dim"] % sizes["num_heads"]:
    reader.fail("hidden_size", f"without head_dim it must be a multiple of num_attention_heads = {sizes['num_heads']}")
  head_dim = reader.integer("head_dim", max(sizes["embed_dim"] // sizes["num_heads"], 1))
  if head_dim % 2:
    reader.fail("head_dim", "rotary embedding needs an even number")
  max_length = reader.integer("max_position_embeddings", 2048)
  return sizes | {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_length": max_length}


def _read_keys(reader: ConfigReader, family: Family) -> dict[str, Any]:
  """The fields that only some families' configs have."""
  fields: dict[str, Any] = {}
  for key in family.keys:
    value = reader.flag(key.name, False) if key.kind == "flag" else reader.optional_number(key.name)
    fields |= dict.fromkeys(key.fields, value)
  if QUERY_SCALE in family.defaults:
    fields["attention_scale"] = reader.number(QUERY_SCALE) ** -0.5
  return fields


def _read_window(reader: ConfigReader, family: Family, num_layers: int) -> dict[str, Any]:
  """Which layers are local, and how far they see."""
  if not family.window:
    return {}
  switched_on = family.window != "optional" or reader.flag("use_sliding_window", False)
  window = None if reader.take("sliding_window") is None else reader.integer("sliding_window")
  if family.window == "all":
    return {"window": window, "local_layers": () if window is None else tuple(range(num_layers))}
  for key in ("max_window_layers", "sliding_window_pattern"):
    if key in family.defaults:
      reader.integer(key)
  types = reader.take("layer_types")
  if types is None:
    assert family.is_local is not None
    pattern = [bool(not reader.errors and family.is_local(reader.values, layer)) for layer in range(num_layers)]
  elif isinstance(types, list) and len(types) == num_layers and all(isinstance(t, str) and t in _KINDS for t in types):
    pattern = [_KINDS[kind] for kind in types]
  else:
    reader.fail("layer_types", f"a list of {num_layers} names, each of {' or '.join(_KINDS)}, is needed")
    return {}
  if not switched_on:
    if types is not None and any(pattern):
      reader.fail("layer_types", "it names sliding_attention, and use_sliding_window is false")
    return {}
  if window is None and any(pattern):
    reader.fail("sliding_window", "layers with sliding_attention need a number of tokens")
    return {}
  return {"window": window, "local_layers": tuple(layer for layer, local in enumerate(pattern) if local)}


def write(config: ModelConfig, spelling: Literal["v4", "v5"] = "v5") -> dict[str, Any]:
  """The contents of a ``config.json`` that transformers, and `read`, understand.

  Args:
    config: the model.
    spelling: ``v5`` writes ``rope_parameters`` and ``dtype`` (transformers 5); ``v4`` writes ``rope_theta``,
      ``rope_scaling`` and ``torch_dtype``.
  """
  family = FAMILIES[config.family]
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
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
    **{key.name: getattr(config, key.fields[0]) for key in family.keys},
    **_write_window(config, family),
    "bos_token_id": config.bos_token_id,
    "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    "pad_token_id": config.pad_token_id,
    **hf_rope.write(config, family, spelling),
    "dtype" if spelling == "v5" else "torch_dtype": config.param_dtype,
  }
  if QUERY_SCALE in family.defaults:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    values[QUERY_SCALE] = _whole(scale**-2)
  _check_written(config, values)
  return values


def _write_window(config: ModelConfig, family: Family) -> dict[str, Any]:
  match family.window:
    case "":
      return {}
    case "all":
      return {"sliding_window": config.window}
  names = {local: name for name, local in _KINDS.items()}
  types = [names[layer in config.local_layers] for layer in range(config.num_layers)]
  values = {"sliding_window": config.window, "layer_types": types}
  return values | ({"use_sliding_window": bool(config.local_layers)} if family.window == "optional" else {})


def _check_written(config: ModelConfig, values: Mapping[str, Any]) -> None:
  """Checks that the family's config can say all that the model is.

  Raises:
    UserError: names each field that a reader of ``values`` would get wrong.
  """
  back = read(values)
  ours = [field.name for field in dataclasses.fields(Architecture)]
  fields = [name for name in ours if getattr(config, name) != getattr(back, name)]
  if "window" in fields and not config.local_layers:
    fields.remove("window")  # of no effect without local layers
  if wrong := [f"{field}={getattr(config, field)!r} (it has {getattr(back, field)!r})" for field in fields]:
    raise UserError(f"a {config.family} config.json cannot describe this model: {'; '.join(wrong)}")


def _whole(value: float) -> int | float:
  """The integer that a number is but for rounding."""
  return round(value) if abs(value - round(value)) < 1e-6 * value else value


def read_plan(values: Mapping[str, Any], num_layers: int) -> SharingPlan:
  """The plan in a ``config.json``'s ``shared_attention``; dense when the key is absent.

  Raises:
    UserError: if it is malformed, or not a plan for a model of this depth.
  """
  shared = values.get("shared_attention")
  if shared is None:
    return SharingPlan.dense(num_layers)
  source = shared.get("source") if isinstance(shared, Mapping) else None
  if not _integers(source):
    raise UserError('config.json: shared_attention must be {"source": [one layer number a layer]}')
  if unknown := sorted(set(shared) - {"source", "head_map"}):
    raise UserError(f"config.json: shared_attention has unknown keys {unknown}")
  plan = as_plan(source, num_layers)
  head_map = shared.get("head_map")
  if head_map is None:
    return plan
  if not isinstance(head_map, list) or not all(entry is None or _integers(entry) for entry in head_map):
    raise UserError("config.json: shared_attention's head_map must be a list, for each layer null or a list of heads")
  return SharingPlan(plan.source, tuple(entry and tuple(entry) for entry in head_map))


def write_plan(plan: SharingPlan) -> dict[str, Any]:
  """What `read_plan` reads back: the ``shared_attention`` of a ``config.json``."""
  values: dict[str, Any] = {"source": list(plan.source)}
  if plan.head_map is not None:
    values["head_map"] = [entry if entry is None else list(entry) for entry in plan.head_map]
  return values


def _integers(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, int) for item in value)
