"""llama.cpp's architectures: the family whose tensor names and config each one maps to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sa_jax.formats.reader import Fields

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
  "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_UP_DOWN = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PACKED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_QWEN_EXPERTS = {
  "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
  "ffn_up_exps": "mlp.experts.{expert}.up_proj", "ffn_down_exps": "mlp.experts.{expert}.down_proj",
  "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
  "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_MIXTRAL_EXPERTS = {
  "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
  "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3", "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}  # fmt: skip
_GPT_OSS = {
  "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks",
  "ffn_gate_inp": "mlp.router", **{name: own for name, own in _QWEN_EXPERTS.items() if name.endswith("exps")},
}  # fmt: skip
_COUNTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
_GEMMA_NORMS = {
  "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_SCALES = {
  "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
  "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_WINDOW = {"attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": "window_pattern"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_4H = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}


class Metadata(NamedTuple):
  """The parts of a file's metadata that architecture-specific values depend on.

  Attributes:
    config: the usual keys of its ``config.json``.
    tensors: its tensors' names in llama.cpp.
  """

  config: Fields
  tensors: frozenset[str]

  def has(self, name: str) -> bool:
    """Whether the first layer has the tensor."""
    return f"blk.0.{name}" in self.tensors


class GgufArchitecture(NamedTuple):
  """How to read one of llama.cpp's architectures.

  Attributes:
    family: the ``model_type`` that its tensors and config map to.
    blocks: its layers' tensors → Hugging Face's names; with ``{expert}`` for slices along the first axis.
    outer: the other tensors → Hugging Face's names.
    layers: prefix of Hugging Face's names of a layer's tensors.
    variants: names that change if the layer has the tensor before them.
    packed: Hugging Face tensors that are concatenations of several of its tensors.
    grouped: whether Hugging Face's code has the rows of ``attn_qkv`` by group; llama.cpp has all queries first.
    keys: further metadata, without the architecture prefix → config keys.
    rest: further config values, from the file's metadata.
    swapped: whether the rows of queries and keys are permuted so that llama.cpp rotates adjacent elements, while
      Hugging Face's code rotates halves.
    norm_offset: constant that was added to norm scales.
  """

  family: str
  blocks: Mapping[str, str] = {**_NORMS, **_ATTENTION, **_MLP}
  outer: Mapping[str, str] = _OUTER
  layers: str = "model.layers"
  variants: Mapping[str, Mapping[str, str]] = {}
  packed: Mapping[str, tuple[str, ...]] = {}
  grouped: bool = False
  keys: Mapping[str, str] = {}
  rest: Callable[[Metadata], Fields] = lambda metadata: {}
  swapped: bool = False
  norm_offset: float = 0.0


def _biases(**keys: str) -> Callable[[Metadata], Fields]:
  """Config keys that are true if the first layer has a tensor."""
  return lambda metadata: {key: metadata.has(f"{name}.bias") for key, name in keys.items()}


def _query_scale(layers: int) -> Callable[[Metadata], Fields]:
  """Gemma scales scores by the head dimension, except the largest model, recognised by its number of layers."""

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
  """The 7B models. Only the vocabulary size in a file shows which of the two it is."""
  if metadata.config["vocab_size"] == 64_000:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
  return {"architectures": ["BaichuanForCausalLM"]}


def _granite(metadata: Metadata) -> Fields:
  """Without an explicit scale, attention uses the usual one."""
  scale = metadata.config.get("attention_multiplier") or metadata.config["head_dim"] ** -0.5
  return {"attention_multiplier": scale} | _biases(attention_bias="attn_q", mlp_bias="ffn_up")(metadata)


def _minicpm(metadata: Metadata) -> Fields:
  """Values missing in a file are those of the first models."""
  config = metadata.config
  depth = config.pop("residual_scale", None)
  logits = config.pop("logit_scale", None)
  return {
    "scale_emb": config.get("scale_emb", 12.0),
    "scale_depth": 1.4 if depth is None else depth * config["num_hidden_layers"] ** 0.5,
    "dim_model_base": 256 if logits is None else config["hidden_size"] / logits,
    "attention_bias": metadata.has("attn_q.bias"),
  }


def _windowed(model_type: str) -> Callable[[Metadata], Fields]:
  """With a window, every fourth layer is global unless a list says which, and the model has this type."""

  def rest(metadata: Metadata) -> Fields:
    config = metadata.config
    pattern = config.pop("window_pattern", None)
    if not config.get("sliding_window"):
      return {"sliding_window": None, "attention_bias": metadata.has("attn_q.bias")}
    layers = config["num_hidden_layers"]
    if not isinstance(pattern, list):
      pattern = [(layer + 1) % 4 != 0 for layer in range(layers)]
    types = [("full_attention", "sliding_attention")[bool(local)] for local in pattern]
    return {"model_type": model_type, "layer_types": types, "attention_bias": metadata.has("attn_q.bias")}

  return rest


def _falcon(metadata: Metadata) -> Fields:
  norms = 2 if metadata.has("attn_norm_2.weight") else 1
  config = metadata.config
  return {
    "new_decoder_architecture": True, "num_ln_in_parallel_attn": norms, "num_kv_heads": config["num_key_value_heads"],
    "ffn_hidden_size": config["intermediate_size"], "bias": metadata.has("attn_qkv.bias"),
  }  # fmt: skip


def _mistral3(metadata: Metadata) -> Fields:
  """Mistral Small, or Ministral 3 if queries are scaled by position."""
  rope = metadata.config.get("rope_scaling") or {}
  if "llama_4_scaling_beta" not in metadata.config:
    return {"model_type": "mistral", "sliding_window": None}
  beta = metadata.config["llama_4_scaling_beta"]
  return {"rope_parameters": rope | {"llama_4_scaling_beta": beta}, "rope_scaling": None, "sliding_window": None}


def _gpt_oss(metadata: Metadata) -> Fields:
  """Values missing in files are those of its models."""
  rope = metadata.config.get("rope_scaling")
  return {"rope_scaling": rope and rope | {"truncate": False}} | _biases(attention_bias="attn_q")(metadata)


def _llama(metadata: Metadata) -> Fields:
  """A Llama, or with experts a Mixtral."""
  count, chosen = (metadata.config.pop(key, 0) for key in ("num_local_experts", "num_experts_per_tok"))
  if not count:
    return _biases(attention_bias="attn_q", mlp_bias="ffn_up")(metadata)
  counts = {"num_local_experts": count, "num_experts_per_tok": chosen}
  return counts | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}


ARCHITECTURES: dict[str, GgufArchitecture] = {
  "llama": GgufArchitecture(
    "llama",
    variants={"ffn_gate_inp": _MIXTRAL_EXPERTS},
    keys=_COUNTS | {"expert_count": "num_local_experts"},
    rest=_llama,
    swapped=True,
  ),
  "qwen2moe": GgufArchitecture(
    "qwen2_moe",
    {**_NORMS, **_ATTENTION, **_QWEN_EXPERTS},
    keys=_COUNTS | _WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    rest=lambda metadata: {"norm_topk_prob": False, "use_sliding_window": False},
  ),
  "qwen3moe": GgufArchitecture(
    "qwen3_moe",
    {**_NORMS, **_ATTENTION, **_QWEN_EXPERTS},
    keys=_COUNTS | _WIDTH,
    rest=lambda metadata: {"norm_topk_prob": True} | _biases(attention_bias="attn_q")(metadata),
  ),
  "olmoe": GgufArchitecture(
    "olmoe",
    {**_NORMS, **_ATTENTION, **_QWEN_EXPERTS},
    keys=_COUNTS,
    rest=lambda metadata: {"norm_topk_prob": False} | _biases(attention_bias="attn_q")(metadata),
  ),
  "gpt-oss": GgufArchitecture(
    "gpt_oss",
    {**_ATTENTION, **_GPT_OSS},
    keys=_COUNTS
    | {
      "expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size",
      "attention.sliding_window": "sliding_window",
    },
    rest=_gpt_oss,
  ),
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
  # llama.cpp's files have its packed rows split, and the rest is a Llama.
  "internlm2": GgufArchitecture("llama", rest=_biases(attention_bias="attn_q"), swapped=True),
  "seed_oss": GgufArchitecture(
    "seed_oss",
    {**_NORMS, **_ATTENTION, **_MLP, "post_attention_norm": "post_attention_layernorm"},
    rest=_biases(attention_bias="attn_q", attention_out_bias="attn_output", mlp_bias="ffn_up"),
  ),
  "granite": GgufArchitecture("granite", keys=_SCALES, rest=_granite, swapped=True),
  "minicpm": GgufArchitecture(
    "minicpm",
    keys={"embedding_scale": "scale_emb", "residual_scale": "residual_scale", "logit_scale": "logit_scale"},
    rest=_minicpm,
    swapped=True,
  ),
  "olmo2": GgufArchitecture("olmo2", {**_POST_NORMS, **_ATTENTION, **_MLP}, keys=_WINDOW, rest=_windowed("olmo3")),
  "smollm3": GgufArchitecture("smollm3", rest=_biases(attention_bias="attn_q", mlp_bias="ffn_up"), swapped=True),
  "exaone4": GgufArchitecture(
    "exaone4", {**_POST_NORMS, **_ATTENTION, **_MLP}, keys=_WINDOW, rest=_windowed("exaone4")
  ),
  "hunyuan-dense": GgufArchitecture(
    "hunyuan_v1_dense",
    {
      **_NORMS, **_ATTENTION, **_MLP, "attn_q_norm": "self_attn.query_layernorm",
      "attn_k_norm": "self_attn.key_layernorm",
    },
    rest=_biases(attention_bias="attn_q"),
  ),
  "command-r": GgufArchitecture("cohere", keys={"logit_scale": "logit_scale"}, rest=_biases(attention_bias="attn_q")),
  "cohere2": GgufArchitecture("cohere2", keys=_WINDOW | {"logit_scale": "logit_scale"}, rest=_windowed("cohere2")),
  "stablelm": GgufArchitecture(
    "stablelm",
    keys={"use_parallel_residual": "stated_residual"},  # llama.cpp goes by the tensors
    rest=lambda metadata: {
      "use_qkv_bias": metadata.has("attn_q.bias"), "use_parallel_residual": not metadata.has("ffn_norm.weight"),
    },
  ),
  "phi2": GgufArchitecture(
    "phi",
    {
      "attn_norm": "input_layernorm", **_ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1",
      "ffn_down": "mlp.fc2",
    },
    outer=_OUTER | {"output_norm": "model.final_layernorm"},
  ),
  "gptneox": GgufArchitecture(
    "gpt_neox",
    {**_NORMS, "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense", **_OF_4H},
    outer={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
    layers="gpt_neox.layers",
    keys={"use_parallel_residual": "use_parallel_residual"},
    rest=_biases(attention_bias="attn_qkv"),
    grouped=True,
  ),
  "falcon": GgufArchitecture(
    "falcon",
    {
      "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value",
      "attn_output": "self_attention.dense", **_OF_4H,
    },
    outer={"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"},
    layers="transformer.h",
    variants={"attn_norm_2": {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}},
    rest=_falcon,
    grouped=True,
  ),
  "starcoder2": GgufArchitecture(
    "starcoder2",
    {**_NORMS, **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    rest=_biases(use_bias="attn_q"),
  ),
  "nemotron": GgufArchitecture(
    "nemotron",
    {**_NORMS, **_ATTENTION, **_UP_DOWN},
    rest=_biases(attention_bias="attn_q", mlp_bias="ffn_up"),
    norm_offset=1.0,
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
