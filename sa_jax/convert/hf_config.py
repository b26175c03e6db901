"""`ModelConfig` from and to Hugging Face's ``config.json``, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sa_jax.config import ModelConfig
from sa_jax.ops.rope import RopeConfig
from sa_jax.plan import SharingPlan, as_plan

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
"""Supported ``model_type`` values and the class that transformers loads them with."""

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
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0, 0.0),
  "pretraining_tp": (1,),
  "rope_interleaved": (False,),
  "is_encoder_decoder": (False,),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "pruned_heads": ({}, None),
  "sliding_window": (None,),
  "quantization_config": (None,),
  "partial_rotary_factor": (1, 1.0, None),
}

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
}

DTYPES = ("float32", "bfloat16", "float16")
"""Floating-point types that parameters may have."""


class _Reader:
  """Takes values out of a config and remembers which keys were read and what was wrong with them."""

  def __init__(self, values: Mapping[str, Any], errors: list[str], prefix: str = ""):
    self._values, self._prefix, self.errors = values, prefix, errors
    self._read: set[str] = set()

  def fail(self, key: str, why: str) -> None:
    self.errors.append(f"{self._prefix}{key} = {self._values.get(key)!r}: {why}")

  def take(self, key: str, default: Any = None) -> Any:
    self._read.add(key)
    value = self._values.get(key)
    return default if value is None else value

  def integer(self, key: str, default: int | None = None) -> int:
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      self.fail(key, "a positive integer is needed")
      return 1
    return value

  def number(self, key: str, default: float | None = None) -> float:
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
      self.fail(key, "a positive number is needed")
      return 1.0
    return float(value)

  def token(self, key: str, absent: int | None) -> int | None:
    self._read.add(key)
    value = self._values.get(key, absent)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
      self.fail(key, "a token id or null is needed")
      return None
    return value

  def choice(self, key: str, choices: tuple[Any, ...], default: Any) -> Any:
    value = self.take(key, default)
    if value not in choices:
      self.fail(key, f"not implemented; {' or '.join(map(repr, choices))} is")
      return default
    return value

  def finish(self, inert: frozenset[str] = frozenset()) -> None:
    """Reports every key that nothing has read."""
    for key in self._values:
      if key not in self._read and key not in inert:
        self.fail(key, "this key is not known, so its effect is not implemented; remove it if it has none")


def read(values: Mapping[str, Any]) -> ModelConfig:
  """Reads the contents of a ``config.json``.

  Both spellings are understood: ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` (transformers 4), and
  ``rope_parameters`` and ``dtype`` (transformers 5). The compute and parameter dtypes are the checkpoint's.

  Raises:
    ValueError: names, all at once, each value that is missing, malformed or not implemented, and each unknown key.
  """
  model_type = values.get("model_type")
  if model_type not in ARCHITECTURES:
    raise ValueError(f"model_type {model_type!r} is not supported; supported are: {', '.join(sorted(ARCHITECTURES))}")
  reader = _Reader(values, [])
  sizes = {ours: reader.integer(theirs) for theirs, ours in _SIZES.items()}
  num_kv_heads = reader.integer("num_key_value_heads", sizes["num_heads"])
  if sizes["num_heads"] % num_kv_heads:
    reader.fail("num_key_value_heads", f"num_attention_heads = {sizes['num_heads']} must be a multiple of it")
  if values.get("head_dim") is None and sizes["embed_dim"] % sizes["num_heads"]:
    reader.fail("hidden_size", f"without head_dim it must be a multiple of num_attention_heads = {sizes['num_heads']}")
  head_dim = reader.integer("head_dim", max(sizes["embed_dim"] // sizes["num_heads"], 1))
  if head_dim % 2:
    reader.fail("head_dim", "rotary embedding needs an even number")
  max_length = reader.integer("max_position_embeddings", 2048)
  eos = reader.take("eos_token_id", () if "eos_token_id" in values else 2)
  eos = (eos,) if isinstance(eos, int) else eos
  if not isinstance(eos, list | tuple) or not all(isinstance(token, int) for token in eos):
    reader.fail("eos_token_id", "a token id, a list of token ids or null is needed")
    eos = ()
  dtype = str(reader.take("dtype", reader.take("torch_dtype", "float32"))).removeprefix("torch.")
  if dtype not in DTYPES:
    reader.fail("dtype" if "dtype" in values else "torch_dtype", f"one of {', '.join(DTYPES)} is needed")
  for key, allowed in _FIXED.items():
    reader.choice(key, allowed, allowed[0])
  rope = _read_rope(reader, max_length)
  config = {
    **sizes,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "max_length": max_length,
    "norm_eps": reader.number("rms_norm_eps", 1e-6),
    "rope": rope,
    "tie_embeddings": reader.choice("tie_word_embeddings", (True, False), False),
    "bos_token_id": reader.token("bos_token_id", absent=1),
    "eos_token_ids": tuple(eos),
    "pad_token_id": reader.token("pad_token_id", absent=None),
    "dtype": dtype,
    "param_dtype": dtype,
  }
  reader.finish(_INERT)
  if reader.errors:
    raise ValueError("config.json cannot be used:\n  " + "\n  ".join(reader.errors))
  return ModelConfig(**config)


def _read_rope(reader: _Reader, max_length: int) -> RopeConfig:
  theta = reader.number("rope_theta", 10_000.0)
  scaling = reader.take("rope_scaling")
  parameters = reader.take("rope_parameters", {})
  for key, value in (("rope_scaling", scaling or {}), ("rope_parameters", parameters)):
    if not isinstance(value, Mapping):
      reader.fail(key, "an object or null is needed")
      return RopeConfig()
  if scaling and parameters and dict(scaling) != dict(parameters):
    reader.fail("rope_scaling", "it says something other than rope_parameters does; keep one of them")
  inner = _Reader(dict(scaling or {}) | dict(parameters), reader.errors, prefix="rope_parameters.")
  theta = inner.number("rope_theta", theta)
  kind = inner.take("rope_type", inner.take("type", "default"))
  inner.choice("partial_rotary_factor", (1, 1.0), 1.0)
  rope = RopeConfig(theta=theta)
  if kind == "llama3":
    rope = RopeConfig(
      theta=theta,
      scaling="llama3",
      factor=inner.number("factor"),
      low_freq_factor=inner.number("low_freq_factor"),
      high_freq_factor=inner.number("high_freq_factor"),
      original_max_length=inner.integer("original_max_position_embeddings", max_length),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
      inner.fail("high_freq_factor", f"it must be greater than low_freq_factor = {rope.low_freq_factor}")
  elif kind != "default":
    inner.fail("rope_type", "not implemented; 'default' or 'llama3' is")
    return rope
  inner.finish()
  return rope


def write(config: ModelConfig, spelling: Literal["v4", "v5"] = "v5") -> dict[str, Any]:
  """The contents of a ``config.json`` that transformers, and `read`, understand.

  Args:
    config: the model.
    spelling: ``v5`` writes ``rope_parameters`` and ``dtype`` (transformers 5); ``v4`` writes ``rope_theta``,
      ``rope_scaling`` and ``torch_dtype``.
  """
  rope: dict[str, Any] = {"rope_type": config.rope.scaling}
  if config.rope.scaling == "llama3":
    rope |= {
      "factor": config.rope.factor,
      "low_freq_factor": config.rope.low_freq_factor,
      "high_freq_factor": config.rope.high_freq_factor,
      "original_max_position_embeddings": config.rope.original_max_length,
    }
  eos = config.eos_token_ids
  values = {
    "architectures": [ARCHITECTURES["llama"]],
    "model_type": "llama",
    **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    "pad_token_id": config.pad_token_id,
  }
  if spelling == "v5":
    return values | {"rope_parameters": {"rope_theta": config.rope.theta, **rope}, "dtype": config.param_dtype}
  scaling = None if config.rope.scaling == "default" else rope
  return values | {"rope_theta": config.rope.theta, "rope_scaling": scaling, "torch_dtype": config.param_dtype}


def read_plan(values: Mapping[str, Any], num_layers: int) -> SharingPlan:
  """The plan in a ``config.json``'s ``shared_attention``; dense when the key is absent.

  Raises:
    ValueError: if it is malformed, or not a plan for a model of this depth.
  """
  shared = values.get("shared_attention")
  if shared is None:
    return SharingPlan.dense(num_layers)
  source = shared.get("source") if isinstance(shared, Mapping) else None
  if not _integers(source):
    raise ValueError('config.json: shared_attention must be {"source": [one layer number a layer]}')
  if unknown := sorted(set(shared) - {"source", "head_map"}):
    raise ValueError(f"config.json: shared_attention has unknown keys {unknown}")
  plan = as_plan(source, num_layers)
  head_map = shared.get("head_map")
  if head_map is None:
    return plan
  if not isinstance(head_map, list) or not all(entry is None or _integers(entry) for entry in head_map):
    raise ValueError("config.json: shared_attention's head_map must be a list, for each layer null or a list of heads")
  return SharingPlan(plan.source, tuple(entry and tuple(entry) for entry in head_map))


def write_plan(plan: SharingPlan) -> dict[str, Any]:
  """What `read_plan` reads back: the ``shared_attention`` of a ``config.json``."""
  values: dict[str, Any] = {"source": list(plan.source)}
  if plan.head_map is not None:
    values["head_map"] = [entry if entry is None else list(entry) for entry in plan.head_map]
  return values


def _integers(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, int) for item in value)
