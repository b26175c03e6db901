"""GGUF files of the Llama architecture, under Hugging Face's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.table import Account, Entry, Index, account
from sa_jax.formats.tokenizer import Tokenizer
from sa_jax.ops import RopeConfig, rope_frequencies
from sa_jax.plan import SharingPlan

_LOG = logging.getLogger("sa_jax")

# How llama.cpp names a Llama's tensors.
_GGUF_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_GGUF_BLOCK_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class GgufFile:
  """A GGUF file of the Llama architecture; quantised tensors are dequantised to float32 as they are read."""

  def __init__(self, path: Path):
    try:
      import gguf
    except ImportError as error:
      raise UserError(f"reading {path} needs the gguf package ({error}): pip install 'sa-jax[gguf]'") from None
    self.path = path
    try:
      reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, OverflowError) as error:
      raise UserError(f"{path} is not a whole GGUF file: {error}") from None
    self._fields = reader.fields
    architecture = self.field("general.architecture", str)
    if architecture != "llama":
      raise UserError(f"{path} holds the architecture {architecture!r}; supported in GGUF is: llama")
    self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    self._dequantize: Callable[[Any, Any], np.ndarray] = gguf.quants.dequantize
    factors = self._tensors.pop(_ROPE_FACTORS, None)
    self._rope_factors = None if factors is None else self._dequantize(factors.data, factors.tensor_type)
    self.shapes = {key: tuple(int(size) for size in reversed(tensor.shape)) for key, tensor in self._tensors.items()}
    self.config = self._config()

  def field(self, name: str, kind: type, default: Any = None) -> Any:
    """A metadata value.

    Raises:
      UserError: if it is absent and there is no default, or is not of the kind.
    """
    if name not in self._fields:
      if default is None:
        raise UserError(f"{self.path} has no metadata value {name}")
      return default
    value = self._fields[name].contents()
    if not isinstance(value, kind):
      raise UserError(f"{self.path}: metadata value {name} is {value!r}, not a {kind.__name__}")
    return value

  def optional(self, name: str) -> Any:
    """A metadata value, or None."""
    return self._fields[name].contents() if name in self._fields else None

  def _config(self) -> dict[str, Any]:
    heads = self.field("llama.attention.head_count", int)
    embed_dim = self.field("llama.embedding_length", int)
    head_dim = self.field("llama.rope.dimension_count", int, embed_dim // max(heads, 1))
    if (key_length := self.optional("llama.attention.key_length")) not in (None, head_dim):
      raise UserError(
        f"{self.path}: heads of {key_length} with rotary embedding on {head_dim} of it are not implemented"
      )
    if (scaling := self.optional("llama.rope.scaling.type")) not in (None, "none", "linear"):
      raise UserError(f"{self.path}: rope scaling {scaling!r} in a GGUF file is not implemented")
    theta = float(self.field("llama.rope.freq_base", float, 10_000.0))
    return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": self.shapes["model.embed_tokens.weight"][0] if "model.embed_tokens.weight" in self.shapes else 0,
      "hidden_size": embed_dim,
      "num_hidden_layers": self.field("llama.block_count", int),
      "num_attention_heads": heads,
      "num_key_value_heads": self.field("llama.attention.head_count_kv", int, heads),
      "head_dim": head_dim,
      "intermediate_size": self.field("llama.feed_forward_length", int),
      "max_position_embeddings": self.field("llama.context_length", int),
      # Stored as float32: the shortest decimal that rounds to it is the value that was meant.
      "rms_norm_eps": float(str(np.float32(self.field("llama.attention.layer_norm_rms_epsilon", float)))),
      "rope_theta": theta,
      "rope_scaling": self._rope_scaling(theta, head_dim),
      "tie_word_embeddings": "lm_head.weight" not in self._tensors,
      "hidden_act": "silu",
      "bos_token_id": self.optional("tokenizer.ggml.bos_token_id"),
      # A chat model ends its turn with a token of its own.
      "eos_token_id": [
        token for name in ("eos", "eot") if (token := self.optional(f"tokenizer.ggml.{name}_token_id")) is not None
      ]
      or None,
      "pad_token_id": self.optional("tokenizer.ggml.padding_token_id"),
      "dtype": "float32",
    }

  def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Linear scaling, or Llama 3.1's, of which llama.cpp stores what it divides each frequency by."""
    linear = self.optional("llama.rope.scaling.factor") or self.optional("llama.rope.scale_linear") or 1.0
    # A factor without a type is llama.cpp's default, which is linear.
    if linear != 1.0 and self.optional("llama.rope.scaling.type") != "none":
      if self._rope_factors is not None:
        raise UserError(f"{self.path}: linear rope scaling together with {_ROPE_FACTORS} is not implemented")
      return {"rope_type": "linear", "factor": float(linear)}
    if self._rope_factors is None:
      return None
    # Of all Llama 3 models; only the factor differs among them.
    factor, low, high, length = float(self._rope_factors.max()), 1.0, 4.0, 8192
    scaled = RopeConfig(theta, "llama3", factor, low_freq_factor=low, high_freq_factor=high, original_max_length=length)
    divided = np.asarray(rope_frequencies(RopeConfig(theta), head_dim) / rope_frequencies(scaled, head_dim))
    if self._rope_factors.shape != divided.shape or not np.allclose(self._rope_factors, divided, rtol=1e-4):
      raise UserError(f"{self.path}: rotary frequencies are divided by {_ROPE_FACTORS}, which are not Llama 3's")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_type": "llama3"} | dict(zip(names, (factor, low, high, length), strict=True))

  @property
  def dtypes(self) -> dict[str, str]:
    """See `Source.dtypes`."""
    return {key: tensor.tensor_type.name for key, tensor in self._tensors.items()}

  def account(self, config: ModelConfig, plan: SharingPlan) -> Account:
    """See `Source.account`."""
    return account(self.shapes, config, plan, self.path)

  def read(self, key: str) -> np.ndarray:
    """See `Source.read`."""
    tensor = self._tensors[key]
    weight = self._dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[key])
    for name, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if key.endswith(f"self_attn.{name}.weight"):
        # GGUF interleaves the two halves of each head's rotary planes; Hugging Face keeps them apart.
        split = weight.reshape(self.config[heads], -1, 2, weight.shape[-1])
        weight = split.swapaxes(1, 2).reshape(weight.shape)
    return weight

  def parameter(self, entry: Entry, index: Index | None = None) -> np.ndarray:
    """See `Source.parameter`."""
    return entry.part_of(self.read(entry.key), index)

  def tokenizer(self) -> Tokenizer:
    """See `Source.tokenizer`."""
    from sa_jax.formats.gguf_tokenizer import from_gguf

    return from_gguf(self)

  def save_extras(self, folder: Path) -> None:
    """See `Source.save_extras`."""
    from sa_jax.formats.gguf_tokenizer import from_gguf, unsupported

    if self.optional("tokenizer.ggml.model") is None:
      return
    if reason := unsupported(self):
      _LOG.warning("%s: the checkpoint has none", reason)
    else:
      from_gguf(self).save(folder)


def _hf_name(name: str) -> str:
  """Hugging Face's name of a GGUF tensor; unknown names stay as they are, for the account to report."""
  if match := _GGUF_BLOCK.fullmatch(name):
    return f"model.layers.{match[1]}.{_GGUF_BLOCK_NAMES.get(match[2], match[2])}.weight"
  return _GGUF_NAMES.get(name, name)
