"""The mixture-of-experts families."""

from __future__ import annotations

from sa_jax.formats import rows
from sa_jax.formats.families_granite import GRANITE_DEFAULTS, GRANITE_KEYS
from sa_jax.formats.family import ExpertKeys, Family, Key, Spelling
from sa_jax.formats.reader import Config, Fields, Fixed

_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "output_bias"), "flag")
_INERT = frozenset({"router_aux_loss_coef", "router_jitter_noise"})  # training only
_DENSE_LAYERS = {
  "mlp_only_layers": Fixed(([],), "a mixture with dense MLPs in some layers"),
  "decoder_sparse_step": Fixed((1,), "a mixture with dense MLPs in some layers"),
}
# `intermediate_size` is the width of dense layers.
_QWEN_DEFAULTS = {
  "max_position_embeddings": 32_768, "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def _qwen(width: int, *, always_windowed: bool) -> Spelling:
  """Qwen's spelling.

  Args:
    width: default width of each expert.
    always_windowed: whether its code applies the window, if there is one, in every layer.
  """

  def usual(values: Config) -> Fields:
    usual = {**values, "intermediate_size": values.get("moe_intermediate_size", width)}
    if not values.get("use_sliding_window"):
      usual["sliding_window"] = None
    return usual

  def own(values: Fields) -> Fields:
    own = {**values, "moe_intermediate_size": values["intermediate_size"]}
    return own | ({"use_sliding_window": values["sliding_window"] is not None} if always_windowed else {})

  return Spelling(usual, own)


def _gpt_oss(values: Config) -> Fields:
  """Adds the default rotary embedding of its config class."""
  said = values.keys() & {"rope_parameters", "rope_scaling"}
  yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
  return {**values} if said else {**values, "rope_scaling": yarn}


EXPERT_FAMILIES: dict[str, Family] = {
  "mixtral": Family(
    "MixtralForCausalLM",
    rows.MIXTRAL,
    rows.MIXTRAL_STACKED,
    experts=ExpertKeys("num_local_experts"),
    defaults={
      "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
      "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    inert=_INERT,
    window="all",
  ),
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    rows.QWEN_MOE,
    rows.QWEN_MOE_STACKED,
    keys=(Key("qkv_bias", ("qkv_bias",), "flag"),),
    experts=ExpertKeys("num_experts", "norm_topk_prob", "shared_expert_intermediate_size", shared_gate=True),
    spelling=_qwen(1408, always_windowed=False),
    fixed=_DENSE_LAYERS,
    defaults=_QWEN_DEFAULTS
    | {
      "num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4,
      "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "sliding_window": 4096,
    },
    inert=_INERT,
    window="optional",
    is_local=lambda values, layer: layer % 2 == 0 and layer < values["max_window_layers"],
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    rows.QWEN_MOE,
    rows.QWEN_MOE_STACKED,
    fields={"qk_norm": "head"},
    keys=(_ATTENTION_BIAS,),
    experts=ExpertKeys("num_experts", "norm_topk_prob"),
    spelling=_qwen(768, always_windowed=True),
    fixed=_DENSE_LAYERS,
    defaults=_QWEN_DEFAULTS
    | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    inert=_INERT | {"use_sliding_window"},
    window="all",
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    rows.OLMOE,
    rows.OLMOE_STACKED,
    fields={"qk_norm": "heads"},
    keys=(_ATTENTION_BIAS,),
    experts=ExpertKeys("num_experts", "norm_topk_prob"),
    fixed={"clip_qkv": Fixed((None,), "clipping of queries, keys and values")},
    defaults={
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None,
      "eos_token_id": 50_279, "num_experts": 64, "num_experts_per_tok": 8,
    },
    inert=_INERT,
  ),
  "granitemoe": Family(
    "GraniteMoeForCausalLM",
    rows.GRANITE_MOE,
    rows.GRANITE_MOE_STACKED,
    keys=GRANITE_KEYS,
    experts=ExpertKeys("num_local_experts"),
    defaults=GRANITE_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    inert=_INERT,
  ),
  "granitemoeshared": Family(
    "GraniteMoeSharedForCausalLM",
    rows.GRANITE_MOE,
    rows.GRANITE_MOE_STACKED,
    keys=GRANITE_KEYS,
    experts=ExpertKeys("num_local_experts", shared="shared_intermediate_size"),
    defaults=GRANITE_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0},
    inert=_INERT,
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    rows.GPT_OSS,
    rows.GPT_OSS_EACH,
    fields={"sinks": True, "mlp_bias": True},
    keys=(_ATTENTION_BIAS, Key("swiglu_limit", ("mlp_clamp",), "number")),
    experts=ExpertKeys("num_local_experts"),
    spelling=Spelling(_gpt_oss, dict),
    fixed={"swiglu_alpha": Fixed((1.702,), "another SwiGLU coefficient")},
    activations={"silu": "quick_gelu"},
    defaults={
      "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
      "rope_theta": 150_000.0, "attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0,
      "num_local_experts": 128, "num_experts_per_tok": 4, "bos_token_id": None, "eos_token_id": None,
    },
    inert=_INERT | {"experts_per_token", "initial_context_length"},
    window="layers",
    is_local=lambda values, layer: layer % 2 == 0,
  ),
}  # fmt: skip
"""By ``model_type``."""
