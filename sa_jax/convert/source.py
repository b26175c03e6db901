"""Where tensors come from: a Hugging Face folder or a GGUF file, read lazily and under Hugging Face's names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from sa_jax.convert.tokenizer import Tokenizer, load_tokenizer

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Source(Protocol):
  """A checkpoint in a foreign format.

  Attributes:
    path: the folder or file.
    config: the contents of its Hugging Face ``config.json``, or what is equivalent.
    shapes: every tensor's name and shape.
  """

  path: Path
  config: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]

  def read(self, key: str) -> np.ndarray:
    """One tensor, in its stored floating-point dtype (float32 if it is quantised)."""
    ...

  def tokenizer(self) -> Tokenizer | None:
    """The checkpoint's tokenizer, if it has one."""
    ...


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    ValueError: if the file is missing or does not hold a JSON object.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"there is no {path.name} in {path.parent}") from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} is not readable JSON: {error}") from None
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold a JSON object, and holds a {type(values).__name__}")
  return values


class HfFolder:
  """A folder with ``config.json`` and ``model.safetensors``, or its shards and their index."""

  def __init__(self, path: Path):
    self.path = path
    self.config = read_json(path / "config.json")
    self._add_generation_config()
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._file_of: dict[str, Path] = {}
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.exists():
      self._open_shards(index)
    elif single.exists():
      self._open(single)
    else:
      raise ValueError(f"there is no model.safetensors and no model.safetensors.index.json in {path}")

  def _add_generation_config(self) -> None:
    """Chat models name further end tokens here, which generation must know."""
    file = self.path / "generation_config.json"
    if file.exists() and "eos_token_id" in (generation := read_json(file)):
      self.config["eos_token_id"] = generation["eos_token_id"]

  def _open_shards(self, index: Path) -> None:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
      raise ValueError(f"{index} has no 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
      raise ValueError(f"{index} names files that are not safetensors files of its folder: {outside}")
    if missing := [name for name in names if not (self.path / name).is_file()]:
      raise ValueError(f"shards are missing from {self.path}: {', '.join(missing)}")
    for name in names:
      self._open(self.path / name)
    if absent := sorted(key for key, name in weight_map.items() if self._file_of.get(key) != self.path / name):
      raise ValueError(f"{index} lists tensors that are not in the file it gives for them: {absent}")

  def _open(self, file: Path) -> None:
    with _safetensors(file) as handle:
      for key in handle.keys():  # noqa: SIM118 (not a mapping)
        if key in self._file_of:
          raise ValueError(f"{key} is in both {self._file_of[key].name} and {file.name} of {self.path}")
        stored = handle.get_slice(key)
        if stored.get_dtype() not in _FLOATS:
          raise ValueError(f"{key} in {file} is {stored.get_dtype()}; one of {', '.join(_FLOATS)} is needed")
        self.shapes[key] = tuple(stored.get_shape())
        self._file_of[key] = file

  def read(self, key: str) -> np.ndarray:
    """See `Source.read`."""
    with _safetensors(self._file_of[key]) as handle:
      return handle.get_tensor(key)

  def tokenizer(self) -> Tokenizer | None:
    """See `Source.tokenizer`."""
    return load_tokenizer(self.path) if (self.path / "tokenizer.json").exists() else None


def _safetensors(file: Path) -> Any:
  from safetensors import SafetensorError, safe_open

  try:
    return safe_open(str(file), framework="numpy")
  except (SafetensorError, OSError, ValueError) as error:
    raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


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
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class GgufFile:
  """A GGUF file of the Llama architecture; quantised tensors are dequantised to float32 as they are read."""

  def __init__(self, path: Path):
    try:
      import gguf
    except ImportError:
      raise ValueError(f"reading {path} needs the gguf package: pip install 'sa-jax[gguf]'") from None
    self.path = path
    try:
      reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, OverflowError) as error:
      raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
    self._fields = reader.fields
    architecture = self.field("general.architecture", str)
    if architecture != "llama":
      raise ValueError(f"{path} holds the architecture {architecture!r}; supported in GGUF is: llama")
    self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    self._dequantize: Callable[[Any, Any], np.ndarray] = gguf.quants.dequantize
    self.shapes = {key: tuple(int(size) for size in reversed(tensor.shape)) for key, tensor in self._tensors.items()}
    self.config = self._config()

  def field(self, name: str, kind: type, default: Any = None) -> Any:
    """A metadata value.

    Raises:
      ValueError: if it is absent and there is no default, or is not of the kind.
    """
    if name not in self._fields:
      if default is None:
        raise ValueError(f"{self.path} has no metadata value {name}")
      return default
    value = self._fields[name].contents()
    if not isinstance(value, kind):
      raise ValueError(f"{self.path}: metadata value {name} is {value!r}, not a {kind.__name__}")
    return value

  def optional(self, name: str) -> Any:
    """A metadata value, or None."""
    return self._fields[name].contents() if name in self._fields else None

  def _config(self) -> dict[str, Any]:
    heads = self.field("llama.attention.head_count", int)
    embed_dim = self.field("llama.embedding_length", int)
    head_dim = self.field("llama.rope.dimension_count", int, embed_dim // max(heads, 1))
    if (key_length := self.optional("llama.attention.key_length")) not in (None, head_dim):
      raise ValueError(
        f"{self.path}: heads of {key_length} with rotary embedding on {head_dim} of it are not implemented"
      )
    if (scaling := self.optional("llama.rope.scaling.type")) not in (None, "none"):
      raise ValueError(f"{self.path}: rope scaling {scaling!r} in a GGUF file is not implemented")
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
      "rope_theta": float(self.field("llama.rope.freq_base", float, 10_000.0)),
      "tie_word_embeddings": "lm_head.weight" not in self._tensors,
      "hidden_act": "silu",
      "bos_token_id": self.optional("tokenizer.ggml.bos_token_id"),
      "eos_token_id": self.optional("tokenizer.ggml.eos_token_id"),
      "pad_token_id": self.optional("tokenizer.ggml.padding_token_id"),
      "dtype": "float32",
    }

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

  def tokenizer(self) -> Tokenizer | None:
    """See `Source.tokenizer`."""
    from sa_jax.convert.tokenizer import from_gguf

    return from_gguf(self) if self.optional("tokenizer.ggml.model") is not None else None


def _hf_name(name: str) -> str:
  """Hugging Face's name of a GGUF tensor; unknown names stay as they are, for the account to report."""
  if match := _GGUF_BLOCK.fullmatch(name):
    return f"model.layers.{match[1]}.{_GGUF_BLOCK_NAMES.get(match[2], match[2])}.weight"
  return _GGUF_NAMES.get(name, name)


def open_source(path: Path) -> Source:
  """Opens a Hugging Face folder or a GGUF file.

  Raises:
    ValueError: if it is neither, or is damaged.
  """
  if path.is_dir():
    return HfFolder(path)
  if not path.exists():
    raise ValueError(f"there is no file or folder {path}")
  with path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise ValueError(
      f"{path} is not a GGUF file; a model is a Hugging Face folder, a GGUF file or an sa_jax checkpoint"
    )
  return GgufFile(path)
