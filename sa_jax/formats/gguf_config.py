"""The metadata of a GGUF file as a ``config.json``; strict, because unread values would be ignored silently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.errors import UserError
from sa_jax.formats.families import FAMILIES
from sa_jax.formats.gguf_architectures import ARCHITECTURES, GgufArchitecture, Metadata
from sa_jax.formats.reader import Config, Fields
from sa_jax.ops import RopeConfig, rope_frequencies

# Metadata that changes the result but is not read for every architecture, and the feature that it selects.
_MEANINGS = {
  "attention.scale": "a custom scale of attention scores",
  "logit_scale": "scaling of logits",
  "residual_scale": "scaling of residual branches",
  "embedding_scale": "scaling of embeddings",
  "attention.sliding_window": "a sliding window",
  "rope.scaling.attn_factor": "scaling of queries and keys",
  "rope.scaling.yarn_ext_factor": "a YaRN extrapolation factor",
  "attention.causal": "non-causal attention",
  "attention.clamp_kqv": "clipping of queries, keys and values",
  "attention.max_alibi_bias": "ALiBi",
  "final_logit_softcapping": "a soft cap of logits",
  "attn_logit_softcapping": "a soft cap of attention scores",
  "expert_count": "a mixture of experts",
  "nextn_predict_layers": "multi-token prediction",
}
# Values without any effect.
_INERT = frozenset(
  """
  vocab_size tensor_data_layout rope.scaling.finetuned attention.layer_norm_epsilon
  expert_used_count
  rope.scaling.original_context_length
  """.split()
)
# Values that state the default.
_NEUTRAL = {
  "attention.causal": True, "expert_count": 0, "rope.scaling.attn_factor": 1.0, "nextn_predict_layers": 0,
  "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0, "attention.clamp_kqv": 0.0,
  "attention.max_alibi_bias": 0.0, "use_parallel_residual": False, "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip


class Values:
  """The metadata of a file; tracks which values have been read."""

  def __init__(self, path: Path, fields: Config):
    self.path, self._fields = path, fields
    self._read: set[str] = set()

  def take(self, name: str, kind: type, default: Any = None) -> Any:
    """A value.

    Raises:
      UserError: if it is absent and there is no default, or has the wrong type.
    """
    if name not in self._fields:
      if default is None:
        raise UserError(f"{self.path} has no metadata value {name}")
      return default
    return self.optional(name, kind)

  def optional(self, name: str, kind: type = object) -> Any:
    """A value, or None.

    Raises:
      UserError: if it has the wrong type; floats must be finite, and may be written as integers.
    """
    self._read.add(name)
    if name not in self._fields:
      return None
    value = self._fields[name].contents()
    if not _is_of(kind, value):
      shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__} of {len(value)}"
      raise UserError(f"{self.path}: metadata value {name} is {shown}, not a {kind.__name__}")
    # Stored as float32: the shortest decimal that rounds to it is the intended value.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  def check_all_read(self, prefix: str) -> None:
    """Checks that no unread value affects the model's result.

    Raises:
      UserError: lists all such values.
    """
    faults = []
    for name in self._fields:
      key = name.removeprefix(prefix)
      if not name.startswith(prefix) or name in self._read or key in _INERT:
        continue
      value = self._fields[name].contents()
      if key in _NEUTRAL and value == _NEUTRAL[key]:
        continue
      meaning = _MEANINGS.get(key, "this unknown key")
      faults.append(f"{name} = {value!r}: {meaning} is not implemented for this architecture")
    if faults:
      raise UserError.of(f"{self.path} cannot be used", faults)


def _is_of(kind: type, value: object) -> bool:
  """Whether a value has a type; booleans are not numbers."""
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def config_of(values: Values, shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, np.ndarray]) -> Fields:
  """Builds the equivalent ``config.json`` from the metadata.

  Args:
    values: the metadata.
    shapes: the tensors' shapes, by llama.cpp's names.
    factors: factors of rotary frequencies, by the names in `ROPE_FACTORS`, if any.

  Raises:
    UserError: if the architecture is not supported, a value is missing or malformed, or one is not implemented.
  """
  architecture = architecture_of(values)
  prefix = values.take("general.architecture", str) + "."
  config = _sizes(values, prefix, shapes) | _head_dim(values, prefix, architecture) | _tokens(values)
  config |= {"model_type": architecture.family, "architectures": [FAMILIES[architecture.family].architecture]}
  for theirs, ours in architecture.keys.items():
    if (value := values.optional(prefix + theirs)) is not None:
      config[ours] = value
  config["rope_scaling"] = _rope_scaling(values, prefix, config, factors)
  config |= architecture.rest(Metadata(config, frozenset(shapes)))
  for key in ("llama_4_scaling_beta", "window_pattern", "stated_residual"):
    config.pop(key, None)
  values.check_all_read(prefix)
  return config


def architecture_of(values: Values) -> GgufArchitecture:
  """The file's architecture.

  Raises:
    UserError: if it is not supported.
  """
  name = values.take("general.architecture", str)
  if name not in ARCHITECTURES:
    raise UserError(
      f"{values.path} has the unsupported architecture {name!r}; supported in GGUF are: {', '.join(ARCHITECTURES)}"
    )
  return ARCHITECTURES[name]


def _sizes(values: Values, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Fields:
  heads = values.take(f"{prefix}attention.head_count", int)
  kind = "rms_" if FAMILIES[architecture_of(values).family].fields.get("norm", "rms") == "rms" else ""
  return {
    "vocab_size": shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else 0,
    "hidden_size": values.take(f"{prefix}embedding_length", int),
    "num_hidden_layers": values.take(f"{prefix}block_count", int),
    "num_attention_heads": heads,
    "num_key_value_heads": values.take(f"{prefix}attention.head_count_kv", int, heads),
    "intermediate_size": values.take(f"{prefix}feed_forward_length", int),
    "max_position_embeddings": values.take(f"{prefix}context_length", int),
    "rms_norm_eps": values.take(f"{prefix}attention.layer_norm_{kind}epsilon", float),
    "rope_theta": values.take(f"{prefix}rope.freq_base", float, 10_000.0),
    "tie_word_embeddings": "output.weight" not in shapes,
    "dtype": "float32",
  }


def _head_dim(values: Values, prefix: str, architecture: GgufArchitecture) -> Fields:
  """The head dimension, and the size of its rotated part."""
  width = values.take(f"{prefix}embedding_length", int) // max(values.take(f"{prefix}attention.head_count", int), 1)
  length = values.optional(f"{prefix}attention.key_length", int)
  rotated = values.optional(f"{prefix}rope.dimension_count", int)
  in_part = "partial_rotary_factor" in FAMILIES[architecture.family].defaults
  head_dim = length or (width if in_part else rotated or width)
  if not in_part and rotated not in (None, head_dim):
    raise UserError(f"{values.path}: rotary embedding on {rotated} of {head_dim} head dimensions is not implemented")
  if (of_values := values.optional(f"{prefix}attention.value_length", int)) not in (None, head_dim):
    raise UserError(
      f"{values.path}: value heads of dimension {of_values} with key heads of {head_dim} are not implemented"
    )
  return {"head_dim": head_dim} | ({"partial_rotary_factor": (rotated or head_dim) / head_dim} if in_part else {})


def _tokens(values: Values) -> Fields:
  # Chat models have a separate end-of-turn token.
  ends = [values.optional(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")]
  return {
    "bos_token_id": values.optional("tokenizer.ggml.bos_token_id", int),
    "eos_token_id": [token for token in ends if token is not None] or None,
    "pad_token_id": values.optional("tokenizer.ggml.padding_token_id", int),
  }


ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of the rotary embedding: divisors of each frequency."""


def _rope_scaling(values: Values, prefix: str, config: Fields, factors: Mapping[str, np.ndarray]) -> Fields | None:
  prefix = f"{prefix}rope.scaling."
  number = lambda name: values.optional(name, float)
  kind = values.optional(f"{prefix}type", str)
  # For a factor without a type, llama.cpp defaults to linear.
  factor = number(f"{prefix}factor") or number(prefix.replace("scaling.", "scale_linear")) or 1.0
  original = values.optional(f"{prefix}original_context_length", int) or config["max_position_embeddings"]
  fixed, short, long = (factors.get(name) for name in ROPE_FACTORS)
  if kind not in (None, "none", "linear", "yarn", "longrope"):
    raise UserError(f"{values.path}: rope scaling {kind!r} in a GGUF file is not implemented")
  if short is not None and long is not None:
    config["original_max_position_embeddings"] = original
    return {
      "rope_type": "longrope",
      "short_factor": short.tolist(),
      "long_factor": long.tolist(),
      "attention_factor": number(f"{prefix}attn_factor") or 1.0,
    }
  if kind == "yarn":
    return _yarn(values, prefix, factor, original)
  if factor != 1.0 and kind != "none":
    if fixed is not None:
      raise UserError(f"{values.path}: linear rope scaling together with {ROPE_FACTORS[0]} is not implemented")
    return {"rope_type": "linear", "factor": float(factor)}
  return None if fixed is None else _llama3(values, config, fixed)


def _yarn(values: Values, prefix: str, factor: float, original: int) -> Fields:
  scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
  for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
    if (beta := values.optional(prefix + theirs, float)) is not None:
      scaling[ours] = beta
  if (scale := values.optional(f"{prefix}attn_factor", float)) not in (None, 1.0):
    scaling["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
  if log_multiplier := values.optional(f"{prefix}yarn_log_multiplier", float):
    scaling |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
  return scaling


def _llama3(values: Values, config: Config, found: np.ndarray) -> Fields:
  """Llama 3.1's scaling; llama.cpp stores the divisor of each frequency."""
  # common to all Llama 3 models; only the factor differs
  theta, factor, low, high, length = config["rope_theta"], float(found.max()), 1.0, 4.0, 8192
  scaled = RopeConfig(theta, "llama3", factor, low_freq_factor=low, high_freq_factor=high, original_max_length=length)
  plain = rope_frequencies(RopeConfig(theta), config["head_dim"])
  divided = np.asarray(plain / rope_frequencies(scaled, config["head_dim"]))
  if found.shape != divided.shape or not np.allclose(found, divided, rtol=1e-4):
    raise UserError(f"{values.path}: {ROPE_FACTORS[0]} are not Llama 3's factors; others are not implemented")
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  return {"rope_type": "llama3"} | dict(zip(names, (factor, low, high, length), strict=True))
