"""Configs of all families: as hubs hold them, as transformers rewrites them, refused by name."""

import pytest

import sa_jax
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
}  # fmt: skip


@pytest.mark.parametrize("family", HUB)
def test_hub_spelling_is_what_transformers_understands(family):
  values = COMMON | HUB[family] | {"model_type": family}
  ours = sa_jax.ModelConfig.from_hf(values)
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
    ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is a mixture of experts"),
    ({"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe' is a mixture of experts"),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' is not known as a decoder-only"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is not known as a decoder-only"),
    ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "'gemma3' is not known"),
    ({"model_type": ["llama"]}, "is not known"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "long"),
    ({"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]}, "architectures"),
    ({"model_type": "baichuan", "max_position_embeddings": None}, "ALiBi"),
    ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act = 'relu'"),
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
  config = sa_jax.ModelConfig.preset("llama-2-7b", qk_norm=True)
  with pytest.raises(ValueError, match="qk_norm=True"):
    config.to_hf()
