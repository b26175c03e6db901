"""Configs of all families: as hubs hold them, as transformers rewrites them, refused by name."""

import pytest

import sa_jax
from sa_jax.formats.families import FAMILIES
from tests.formats.hf_models import CONFIGS, SIZES, STAND_INS

transformers = pytest.importorskip("transformers")

COMMON = {
  "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
  "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.44.0",
  "initializer_range": 0.02, "attention_dropout": 0.0, "max_position_embeddings": 4096,
}  # fmt: skip
# As the hub's config.json files spell them (transformers 4), sizes aside.
HUB = {
  "mistral": {"num_key_value_heads": 2, "rope_theta": 1e4, "sliding_window": 512, "hidden_act": "silu"},
  "qwen2": {
    "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": 131072, "max_window_layers": 2,
    "use_sliding_window": False, "hidden_act": "silu", "tie_word_embeddings": True,
  },
  "qwen3": {
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6, "rope_scaling": None, "sliding_window": None,
    "max_window_layers": 28, "use_sliding_window": False, "attention_bias": False, "hidden_act": "silu",
  },
  "phi3": {
    "num_key_value_heads": 4, "rope_theta": 1e4, "rope_scaling": None, "sliding_window": 2047, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "original_max_position_embeddings": 4096, "hidden_act": "silu", "attention_bias": False,
  },
  "gemma2": {
    "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16, "rope_theta": 1e4, "sliding_window": 512,
  },
  "gemma3_text": {
    "num_key_value_heads": 2, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    "cache_implementation": "hybrid", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "query_pre_attn_scalar": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 3,
  },
  "granite": {
    "num_key_value_heads": 2, "rope_theta": 5e6, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
    "tie_word_embeddings": True, "hidden_act": "silu", "pad_token_id": 0,
  },
  "granitemoehybrid": {
    "num_key_value_heads": 2, "rope_theta": 1e7, "rope_scaling": None, "attention_bias": False,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12, "logits_scaling": 10, "residual_multiplier": 0.22,
    "layer_types": ["attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 8,
    "shared_intermediate_size": 48, "position_embedding_type": "rope", "normalization_function": "rmsnorm",
    "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_expand": 2, "mamba_conv_bias": True, "router_aux_loss_coef": 0.01,
    "output_router_logits": False, "init_method": "mup", "tie_word_embeddings": True, "hidden_act": "silu",
  },
  "olmo2": {"rope_theta": 5e5, "rope_scaling": None, "attention_bias": False, "hidden_act": "silu"},
  "olmo3": {
    "rope_theta": 5e5, "attention_bias": False, "hidden_act": "silu", "sliding_window": 4096,
    "rope_scaling": {
      "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
      "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "max_position_embeddings": 65536,
  },
  "smollm3": {
    "num_key_value_heads": 2, "rope_theta": 5e6, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
    "layer_types": ["full_attention"] * 4, "max_window_layers": 28, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0], "sliding_window": None, "use_sliding_window": False, "pretraining_tp": 2,
    "hidden_act": "silu",
  },
  "exaone4": {
    "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e6, "sliding_window": None, "sliding_window_pattern": None,
    "layer_types": ["full_attention"] * 4, "max_position_embeddings": 65536, "tie_word_embeddings": True,
    "rope_scaling": {
      "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
      "rope_type": "llama3",
    },
    "hidden_act": "silu",
  },
  "hunyuan_v1_dense": {
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4, "attention_bias": False, "tie_word_embeddings": True,
    "rope_scaling": {
      "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
      "type": "dynamic",
    },
    "use_qk_norm": True, "use_cla": False, "cla_share_factor": 2, "eod_token_id": 3, "hidden_act": "silu",
  },
  "cohere": {
    "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 8e6, "attention_bias": False, "use_qk_norm": False,
    "hidden_act": "silu",
  },
  "cohere2": {
    "num_key_value_heads": 2, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "rope_theta": 5e4, "attention_bias": False,
    "cache_implementation": "hybrid", "head_dim": 8, "layer_switch": 4,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rotary_pct": 1.0, "sliding_window": 4096,
    "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": False, "hidden_act": "silu",
  },
  "stablelm": {
    "num_key_value_heads": 4, "layer_norm_eps": 1e-5, "rope_theta": 1e4, "partial_rotary_factor": 0.25,
    "use_qkv_bias": True, "use_parallel_residual": False, "qk_layernorm": False, "hidden_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 64,
  },
  "phi": {
    "num_key_value_heads": 4, "layer_norm_eps": 1e-5, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "qk_layernorm": False, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "rope_scaling": None, "hidden_act": "gelu_new",
  },
  "gpt_neox": {
    "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True,
    "hidden_act": "gelu", "hidden_size": 64,
  },
  "falcon": {
    "layer_norm_epsilon": 1e-5, "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
    "hidden_dropout": 0.0, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True,
    "intermediate_size": None,
  },
  "starcoder2": {
    "num_key_value_heads": 2, "norm_epsilon": 1e-5, "rope_theta": 1e6, "use_bias": True, "sliding_window": 4096,
    "embedding_dropout": 0.1, "residual_dropout": 0.1, "mlp_type": "default", "norm_type": "layer_norm",
    "hidden_act": "gelu_pytorch_tanh",
  },
  "nemotron": {
    "num_key_value_heads": 2, "norm_eps": 1e-5, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "head_dim": 8,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "relu2",
  },
  "mixtral": {
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False,
    "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": None, "hidden_act": "silu",
  },
  "qwen2_moe": {
    "num_key_value_heads": 4, "decoder_sparse_step": 1, "max_window_layers": 21, "moe_intermediate_size": 24,
    "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4, "output_router_logits": False,
    "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 40, "sliding_window": 32768,
    "use_sliding_window": False, "hidden_act": "silu",
  },
  "qwen3_moe": {
    "num_key_value_heads": 2, "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 16,
    "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 24, "norm_topk_prob": True,
    "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "rope_scaling": None,
    "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    "hidden_act": "silu",
  },
  "olmoe": {
    "attention_bias": False, "clip_qkv": None, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8,
    "num_key_value_heads": 4, "output_router_logits": False, "rope_scaling": None, "rope_theta": 1e4,
    "router_aux_loss_coef": 0.01, "hidden_act": "silu",
  },
  "granitemoe": {
    "num_key_value_heads": 2, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": False,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
    "num_experts_per_tok": 8, "num_local_experts": 32, "router_aux_loss_coef": 0.0, "output_router_logits": False,
    "tie_word_embeddings": True, "hidden_act": "silu",
  },
}  # fmt: skip


@pytest.mark.parametrize("family", HUB)
def test_hub_spelling_is_what_transformers_understands(family):
  values = COMMON | HUB[family] | {"model_type": family}
  if "rms_norm_eps" in FAMILIES[family].aliases.values():
    del values["rms_norm_eps"]  # it has a name of its own
  ours = sa_jax.ModelConfig.from_hf(values, strict=True)
  theirs = transformers.AutoConfig.for_model(**values).to_dict() | {"dtype": "bfloat16"}
  assert sa_jax.ModelConfig.from_hf(theirs) == ours


@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in STAND_INS])
def test_round_trip(family, spelling):
  values = transformers.AutoConfig.for_model(family, **{**SIZES, **CONFIGS[family]}).to_dict()
  config = sa_jax.ModelConfig.from_hf(values | {"dtype": "float32"})
  assert sa_jax.ModelConfig.from_hf(config.to_hf(spelling)) == config
  back = transformers.AutoConfig.for_model(**config.to_hf(spelling)).to_dict()
  assert sa_jax.ModelConfig.from_hf(back | {"dtype": "float32"}) == config


def test_local_layers():
  of = lambda family, **changes: (
    sa_jax.ModelConfig.from_hf(COMMON | HUB[family] | {"model_type": family} | changes).local_layers
  )
  assert of("mistral") == (0, 1, 2, 3)
  assert of("mistral", sliding_window=None) == ()
  assert of("qwen2") == ()
  assert of("qwen2", use_sliding_window=True) == (2, 3)
  assert of("gemma2") == (0, 2)
  assert of("gemma3_text") == (0, 1, 3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "glm4_moe", "n_routed_experts": 8}, "'glm4_moe' is an unsupported kind of mixture of experts"),
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "at most num_local_experts = 2"),
    (
      {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
      r"mlp_only_layers = \[0\]: a mixture with dense MLPs in some layers",
    ),
    (
      {"model_type": "qwen2_moe", "decoder_sparse_step": 2},
      "decoder_sparse_step = 2: a mixture with dense MLPs in some layers",
    ),
    ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' is not known to be a decoder-only"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is not known to be a decoder-only"),
    ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "'gemma3' is not known"),
    ({"model_type": ["llama"]}, "is not known"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "long"),
    ({"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]}, "architectures"),
    ({"model_type": "baichuan", "max_position_embeddings": None}, "ALiBi"),
    ({"model_type": "llama", "hidden_act": "selu"}, "hidden_act = 'selu'"),
    ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "a list of 4 names"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "use_sliding_window is false"),
  ],
)
def test_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(")):
    sa_jax.ModelConfig.from_hf(COMMON | changes)


def test_write_says_what_a_family_cannot():
  config = sa_jax.ModelConfig.preset("llama-2-7b", qk_norm="head")
  with pytest.raises(ValueError, match="qk_norm='head'"):
    config.to_hf()
