"""The model families: what their ``config.json`` says, beside the rows of their checkpoints.

A family is data. To add one, write its rows (most are Llama's), the config keys that only it has, and the values that
transformers assumes when its keys are absent.
"""

from __future__ import annotations

from sa_jax.formats import rows
from sa_jax.formats.family import Family, Key
from sa_jax.formats.reader import Config, Fixed

_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "output_bias"), "flag")
_QKV_BIAS = Key("attention_bias", ("qkv_bias",), "flag")
_MLP_BIAS = Key("mlp_bias", ("mlp_bias",), "flag")
_LOGITS_SOFTCAP = Key("final_logit_softcapping", ("logits_softcap",), "number")
_SCORES_SOFTCAP = Key("attn_logit_softcapping", ("attention_softcap",), "number")
_QUERY_SCALE = Key("query_pre_attn_scalar", ("attention_scale",), "inverse_root")
_GEMMA_FIELDS = {"norm_about_one": True, "scale_embeddings": True}
_GEMMA_DEFAULTS = {
  "tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192, "bos_token_id": 2, "eos_token_id": 1,
  "pad_token_id": 0,
}  # fmt: skip
_GEMMA_2_DEFAULTS = _GEMMA_DEFAULTS | {
  "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}  # fmt: skip
_GEMMA_INERT = frozenset({"hidden_act", "_sliding_window_pattern"})
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
_QWEN_DEFAULTS = {
  "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28,
  "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GLM_DEFAULTS = {
  "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-07,
  "pad_token_id": 151_329, "eos_token_id": [151_329, 151_336, 151_338], "bos_token_id": None, "attention_bias": True,
  "partial_rotary_factor": 0.5,
}  # fmt: skip


def _from_max_window_layers(values: Config, layer: int) -> bool:
  return layer >= values["max_window_layers"]


FAMILIES: dict[str, Family] = {
  "llama": Family(
    "LlamaForCausalLM", rows.LLAMA, keys=(_ATTENTION_BIAS, _MLP_BIAS), inert=frozenset({"sliding_window"})
  ),
  "mistral": Family("MistralForCausalLM", rows.LLAMA, defaults=_MISTRAL_DEFAULTS, window="all"),
  "ministral": Family(
    "MinistralForCausalLM",
    rows.LLAMA,
    defaults=_MISTRAL_DEFAULTS,
    window="layers",
    is_local=lambda values, layer: values["sliding_window"] is not None,
  ),
  "ministral3": Family(
    "Ministral3ForCausalLM",
    rows.LLAMA,
    required={"rope_parameters": "the scaling of its rotary embedding"},
    defaults={
      "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5,
      "pad_token_id": 11,
    },
    window="all",
    grows_queries=True,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    rows.LLAMA,
    fields={"qkv_bias": True},
    defaults=_QWEN_DEFAULTS,
    window="optional",
    is_local=_from_max_window_layers,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    rows.LLAMA,
    fields={"qk_norm": True},
    keys=(_ATTENTION_BIAS,),
    defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    window="optional",
    is_local=_from_max_window_layers,
  ),
  "mimo": Family(
    "MiMoForCausalLM",
    rows.LLAMA,
    keys=(_QKV_BIAS,),
    defaults=_QWEN_DEFAULTS | {"attention_bias": True},
    inert=frozenset({"num_nextn_predict_layers"}),
    dropped={r"model\.mtp_layers\..*": "it predicts further tokens, which generation does one at a time"},
    window="optional",
    is_local=_from_max_window_layers,
  ),
  "seed_oss": Family(
    "SeedOssForCausalLM",
    rows.LLAMA,
    keys=(_QKV_BIAS, Key("attention_out_bias", ("output_bias",), "flag"), _MLP_BIAS),
    defaults={
      "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524_288, "attention_bias": True,
      "bos_token_id": 0, "pad_token_id": 1,
    },
  ),
  "internlm3": Family(
    "InternLM3ForCausalLM",
    rows.LLAMA,
    keys=(_ATTENTION_BIAS, _MLP_BIAS),
    aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    defaults={
      "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
      "pad_token_id": 2,
    },
  ),
  "ernie4_5": Family(
    "Ernie4_5ForCausalLM",
    rows.LLAMA,
    keys=(Key("use_bias", ("qkv_bias", "output_bias", "mlp_bias"), "flag"),),
    defaults={
      "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
      "pad_token_id": 0, "tie_word_embeddings": True, "rope_theta": 500_000.0,
    },
    interleaved=True,
  ),
  "helium": Family(
    "HeliumForCausalLM",
    rows.LLAMA,
    keys=(_QKV_BIAS, _MLP_BIAS),
    defaults={
      "num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8,
      "pad_token_id": 3, "rope_theta": 100_000.0,
    },
    interleaved=True,
  ),
  "glm": Family("GlmForCausalLM", rows.GLM, keys=(_QKV_BIAS,), defaults=_GLM_DEFAULTS, interleaved=True),
  "glm4": Family(
    "Glm4ForCausalLM",
    rows.GLM4,
    fields={"post_norms": True},
    keys=(_QKV_BIAS,),
    defaults=_GLM_DEFAULTS,
    interleaved=True,
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    rows.PHI3,
    defaults={
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32_000, "pad_token_id": 32_000,
      "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096,
    },
    window="all",
    ropes=("default", "longrope"),
  ),
  "baichuan": Family(
    "BaichuanForCausalLM",
    rows.BAICHUAN,
    fields={"normalize_head": True},
    # Baichuan 1 spells it BaiChuan, and has no NormHead.
    fixed={"architectures": Fixed((["BaichuanForCausalLM"],), "another model of this name")},
    required={"max_position_embeddings": "the 13B models lack it: they use ALiBi, which is not implemented"},
    ropes=("default",),
  ),
  "internlm2": Family(
    "InternLM2ForCausalLM",
    rows.INTERNLM2,
    keys=(Key("bias", ("qkv_bias", "output_bias"), "flag"),),
    ropes=("default", "linear", "dynamic"),
  ),
  "gemma": Family(
    "GemmaForCausalLM",
    rows.LLAMA,
    fields=_GEMMA_FIELDS,
    keys=(_ATTENTION_BIAS,),
    defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    inert=frozenset({"hidden_activation"}),
    # "gelu" is what the first releases wrote, and transformers takes it for the tanh formula.
    activations={"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    rows.GEMMA,
    fields=_GEMMA_FIELDS | {"post_norms": True},
    keys=(_ATTENTION_BIAS, _LOGITS_SOFTCAP, _SCORES_SOFTCAP, _QUERY_SCALE),
    defaults=_GEMMA_2_DEFAULTS | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    inert=_GEMMA_INERT,
    activation="hidden_activation",
    window="layers",
    is_local=lambda values, layer: layer % 2 == 0,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    rows.GEMMA,
    fields=_GEMMA_FIELDS | {"post_norms": True, "qk_norm": True},
    keys=(_ATTENTION_BIAS, _LOGITS_SOFTCAP, _QUERY_SCALE),
    # A multimodal config.json leaves out what Gemma 3's class has for its default.
    defaults=_GEMMA_2_DEFAULTS
    | {
      "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
      "num_attention_heads": 8, "max_position_embeddings": 131_072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
      "sliding_window_pattern": 6,
    },
    inert=_GEMMA_INERT | {"attn_logit_softcapping"},
    activation="hidden_activation",
    window="layers",
    is_local=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
    local_rope="own",
  ),
}  # fmt: skip
"""By ``model_type``."""
