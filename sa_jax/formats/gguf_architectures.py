"""llama.cpp's architectures: under which family's names and config each is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sa_jax.formats.reader import Config, Fields

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
  "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PACKED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA_NORMS = {
  "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


class Metadata(NamedTuple):
  """What a file says of its model, as far as an architecture's own values follow from it.

  Attributes:
    config: the usual keys of its ``config.json``.
    tensors: the names of its tensors, under llama.cpp's.
  """

  config: Config
  tensors: frozenset[str]

  def has(self, name: str) -> bool:
    """Whether the first layer has the tensor."""
    return f"blk.0.{name}" in self.tensors


class GgufArchitecture(NamedTuple):
  """How one of llama.cpp's architectures is read.

  Attributes:
    family: the ``model_type`` that its tensors and config are read as.
    blocks: its layers' tensors, and Hugging Face's names of them.
    packed: Hugging Face's tensors that are several of its own, one behind the other.
    keys: further metadata, without the architecture's name before it, and the config key that it is.
    rest: what else the config says, from what is known of the file.
    swapped: whether the rows of queries and keys lie so that llama.cpp rotates neighbours, where Hugging Face's code
      rotates halves.
    norm_offset: what was added to the scales of norms.
  """

  family: str
  blocks: Mapping[str, str] = {**_NORMS, **_ATTENTION, **_MLP}
  packed: Mapping[str, tuple[str, ...]] = {}
  keys: Mapping[str, str] = {}
  rest: Callable[[Metadata], Fields] = lambda metadata: {}
  swapped: bool = False
  norm_offset: float = 0.0


def _biases(**keys: str) -> Callable[[Metadata], Fields]:
  """Config keys that are true where the first layer has a tensor."""
  return lambda metadata: {key: metadata.has(f"{name}.bias") for key, name in keys.items()}


def _query_scale(layers: int) -> Callable[[Metadata], Fields]:
  """Gemma scales scores by the head dimension, but for the largest model, which has so many layers."""

  def rest(metadata: Metadata) -> Fields:
    config = metadata.config
    by_width = config["num_hidden_layers"] == layers
    return {
      "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
      if by_width
      else config["head_dim"]
    }

  return rest


def _baichuan(metadata: Metadata) -> Fields:
  """The 7B models. Nothing in a file says which of the two it is, but its vocabulary."""
  if metadata.config["vocab_size"] == 64_000:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
  return {"architectures": ["BaichuanForCausalLM"]}


def _mistral3(metadata: Metadata) -> Fields:
  """Mistral Small, unless queries grow with their position, as Ministral 3's do."""
  rope = metadata.config.get("rope_scaling") or {}
  if "llama_4_scaling_beta" not in metadata.config:
    return {"model_type": "mistral", "sliding_window": None}
  beta = metadata.config["llama_4_scaling_beta"]
  return {"rope_parameters": rope | {"llama_4_scaling_beta": beta}, "rope_scaling": None, "sliding_window": None}


ARCHITECTURES: dict[str, GgufArchitecture] = {
  "llama": GgufArchitecture("llama", rest=_biases(attention_bias="attn_q", mlp_bias="ffn_up"), swapped=True),
  "mistral3": GgufArchitecture(
    "ministral3", keys={"attention.temperature_scale": "llama_4_scaling_beta"}, rest=_mistral3, swapped=True
  ),
  "qwen2": GgufArchitecture("qwen2"),
  "qwen3": GgufArchitecture("qwen3", rest=_biases(attention_bias="attn_q")),
  "gemma": GgufArchitecture("gemma", norm_offset=1.0),
  "gemma2": GgufArchitecture(
    "gemma2",
    {**_GEMMA_NORMS, **_ATTENTION, **_MLP},
    keys={
      "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
      "attention.sliding_window": "sliding_window",
    },
    rest=_query_scale(46),
    norm_offset=1.0,
  ),
  "gemma3": GgufArchitecture(
    "gemma3_text",
    {**_GEMMA_NORMS, **_ATTENTION, **_MLP},
    keys={
      "final_logit_softcapping": "final_logit_softcapping", "attention.sliding_window": "sliding_window",
      "attention.sliding_window_pattern": "sliding_window_pattern", "rope.freq_base_swa": "rope_local_base_freq",
    },
    rest=_query_scale(62),
    norm_offset=1.0,
  ),
  "phi3": GgufArchitecture(
    "phi3",
    {**_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", **_PACKED_MLP},
    keys={"attention.sliding_window": "sliding_window"},
    rest=lambda metadata: {"sliding_window": metadata.config.get("sliding_window") or None},
  ),
  "baichuan": GgufArchitecture(
    "baichuan", packed={"self_attn.W_pack": ("attn_q", "attn_k", "attn_v")}, rest=_baichuan, swapped=True
  ),
  # Its packed rows come apart in llama.cpp's files, and the rest is a Llama.
  "internlm2": GgufArchitecture("llama", rest=_biases(attention_bias="attn_q"), swapped=True),
  "seed_oss": GgufArchitecture(
    "seed_oss",
    {**_NORMS, **_ATTENTION, **_MLP, "post_attention_norm": "post_attention_layernorm"},
    rest=_biases(attention_bias="attn_q", attention_out_bias="attn_output", mlp_bias="ffn_up"),
  ),
  "ernie4_5": GgufArchitecture("ernie4_5", rest=_biases(use_bias="attn_q")),
  "glm4": GgufArchitecture(
    "glm4",
    {
      "attn_norm": "input_layernorm", "post_attention_norm": "post_self_attn_layernorm",
      "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm", **_ATTENTION, **_PACKED_MLP,
    },
    rest=_biases(attention_bias="attn_q"),
  ),
}  # fmt: skip
"""By ``general.architecture``."""
