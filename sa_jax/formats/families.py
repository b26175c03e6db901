"""The model families: how to interpret their ``config.json``, and the rows of their checkpoints.

A family is data. To add one, write its rows (most are Llama's), the config keys that only it has, and transformers'
defaults for its keys.
"""

from __future__ import annotations

import math

from sa_jax.formats import rows
from sa_jax.formats.families_experts import EXPERT_FAMILIES
from sa_jax.formats.families_granite import GRANITE_DEFAULTS, GRANITE_KEYS
from sa_jax.formats.families_layer_norm import LAYER_NORM_FAMILIES
from sa_jax.formats.family import Family, Key, Spelling
from sa_jax.formats.reader import Config, Fixed

_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "output_bias"), "flag")
_QKV_BIAS = Key("attention_bias", ("qkv_bias",), "flag")
_MLP_BIAS = Key("mlp_bias", ("mlp_bias",), "flag")
_LOGITS_SOFTCAP = Key("final_logit_softcapping", ("logits_softcap",), "number")
_SCORES_SOFTCAP = Key("attn_logit_softcapping", ("attention_softcap",), "number")
_QUERY_SCALE = Key("query_pre_attn_scalar", ("attention_scale",), "inverse_root")
_GEMMA_FIELDS = {"norm_about_one": True, "embedding_scale": lambda sizes: math.sqrt(sizes["embed_dim"])}
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
_GRANITE_4 = Spelling(
  usual=lambda values: {**values, "intermediate_size": values.get("shared_intermediate_size", 1024)},
  own=lambda values: {
    **values, "shared_intermediate_size": values["intermediate_size"], "num_local_experts": 0,
    "position_embedding_type": "rope", "mamba_n_heads": 1,  # transformers checks it even so
  },
)  # fmt: skip
_GRANITE_4_INERT = frozenset(
  """
  shared_intermediate_size num_experts_per_tok router_aux_loss_coef mamba_n_heads mamba_n_groups mamba_d_state
  mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias mamba_proj_bias time_step_limit init_method
  layers_block_type
  """.split()
)
_OLMO_FIELDS = {"pre_norms": False, "post_norms": True, "qk_norm": "heads"}
_OLMO_DEFAULTS = {"rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50_279}


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
    fields={"qk_norm": "head"},
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
    fixed={"architectures": Fixed((["BaichuanForCausalLM"],), "an older model of this name")},
    required={"max_position_embeddings": "it must be given: the 13B models lack it, as they use ALiBi"},
    ropes=("default",),
  ),
  "internlm2": Family(
    "InternLM2ForCausalLM",
    rows.INTERNLM2,
    keys=(Key("bias", ("qkv_bias", "output_bias"), "flag"),),
    ropes=("default", "linear", "dynamic"),
  ),
  "granite": Family("GraniteForCausalLM", rows.LLAMA, keys=(*GRANITE_KEYS, _MLP_BIAS), defaults=GRANITE_DEFAULTS),
  "granitemoehybrid": Family(
    "GraniteMoeHybridForCausalLM",
    rows.GRANITE_4,
    keys=GRANITE_KEYS,
    spelling=_GRANITE_4,
    fixed={
      "num_local_experts": Fixed((0,), "a mixture of experts"),
      "position_embedding_type": Fixed(("rope",), "another position embedding"),
      "normalization_function": Fixed(("rmsnorm",), "another norm"),
    },
    required={
      "layer_types": "it must be given: by default, all layers are Mamba layers",
      "position_embedding_type": "it must be given: by default, there is no rotary embedding",
    },
    defaults=GRANITE_DEFAULTS | {"num_local_experts": 8},
    inert=_GRANITE_4_INERT,
    window="none",
  ),
  "minicpm": Family(
    "MiniCPMForCausalLM",
    rows.LLAMA,
    keys=(
      _ATTENTION_BIAS,
      Key("scale_emb", ("embedding_scale",), "number"),
      Key("scale_depth", ("residual_scale",), "over_root_depth"),
      Key("dim_model_base", ("logits_scale",), "over_width"),
    ),
    fixed={"sparse_config": Fixed((None,), "sparse attention")},
    defaults={"scale_emb": 1, "scale_depth": 1, "dim_model_base": 1, "tie_word_embeddings": True},
    inert=frozenset({"mup_denominator"}),
    ropes=("default", "linear", "dynamic", "longrope"),
  ),
  "olmo2": Family(
    "Olmo2ForCausalLM", rows.OLMO, fields=_OLMO_FIELDS, keys=(_ATTENTION_BIAS,), defaults=_OLMO_DEFAULTS
  ),
  "olmo3": Family(
    "Olmo3ForCausalLM",
    rows.OLMO,
    fields=_OLMO_FIELDS,
    keys=(_ATTENTION_BIAS,),
    defaults=_OLMO_DEFAULTS | {"rope_theta": 500_000.0, "sliding_window": 4096},
    window="layers",
    is_local=lambda values, layer: (layer + 1) % 4 != 0,
    local_rope="unscaled",
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    rows.LLAMA,
    keys=(_ATTENTION_BIAS, _MLP_BIAS),
    fixed={"use_sliding_window": Fixed((False,), "a sliding window in layers without rotary embedding")},
    defaults={
      "num_key_value_heads": 4, "max_position_embeddings": 32_768, "rope_theta": 2e6, "bos_token_id": 128_000,
      "eos_token_id": 128_001, "pad_token_id": 128_004, "tie_word_embeddings": True,
    },
    inert=frozenset({"sliding_window", "layer_types"}),
    local_rope="without",
  ),
  "exaone4": Family(
    "Exaone4ForCausalLM",
    rows.EXAONE4,
    fields={"pre_norms": False, "post_norms": True, "qk_norm": "head"},
    defaults={
      "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "bos_token_id": 0, "sliding_window": 4096,
      "sliding_window_pattern": 4,
    },
    window="layers",
    is_local=lambda values, layer: (
      values["sliding_window"] is not None and (layer + 1) % values["sliding_window_pattern"] != 0
    ),
    local_rope="alone",
  ),
  "hunyuan_v1_dense": Family(
    "HunYuanDenseV1ForCausalLM",
    rows.HUNYUAN,
    fields={"qk_norm": "head", "norm_rotated": True},
    keys=(_ATTENTION_BIAS,),
    fixed={
      "use_qk_norm": Fixed((True,), "attention without normalised queries and keys"),
      "use_cla": Fixed((False,), "cross-layer attention, in which layers already share keys and values,"),
      "use_mla": Fixed((False,), "multi-head latent attention"),
    },
    defaults={"rms_norm_eps": 1e-5, "pad_token_id": 0},
    inert=frozenset({"eod_token_id", "cla_share_factor"}),
    fixed_stretch=True,
  ),
  "gemma": Family(
    "GemmaForCausalLM",
    rows.LLAMA,
    fields=_GEMMA_FIELDS,
    keys=(_ATTENTION_BIAS,),
    defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    inert=frozenset({"hidden_activation"}),
    # The first releases have "gelu", which transformers treats as the tanh formula.
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
    fields=_GEMMA_FIELDS | {"post_norms": True, "qk_norm": "head"},
    keys=(_ATTENTION_BIAS, _LOGITS_SOFTCAP, _QUERY_SCALE),
    # A multimodal config.json omits the defaults of Gemma 3's class.
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
  **LAYER_NORM_FAMILIES,
  **EXPERT_FAMILIES,
}  # fmt: skip
"""By ``model_type``."""
