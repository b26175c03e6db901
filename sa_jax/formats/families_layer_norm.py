"""The families with layer norm; see `sa_jax.formats.families`."""

from __future__ import annotations

from sa_jax.formats import rows_layer_norm as rows
from sa_jax.formats.family import Family, Key, Spelling
from sa_jax.formats.reader import Config, Fields, Fixed

_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "output_bias"), "flag")
_ALL_BIASES = ("qkv_bias", "output_bias", "mlp_bias")
_EPS = {"layer_norm_eps": "rms_norm_eps"}
_NORM_OF_EACH_HEAD = Fixed((False,), "a norm of queries and keys with one scale per head")
_BIASED = {"norm": "layer", "norm_bias": True}
_COHERE_DEFAULTS = {
  "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 5,
  "eos_token_id": 255_001, "tie_word_embeddings": True, "logit_scale": 0.0625,
}  # fmt: skip
_COHERE_FIELDS = {"norm": "layer", "parallel": True, "shared_norm": True}
_COHERE_KEYS = (_ATTENTION_BIAS, Key("logit_scale", ("logits_scale",), "number"))
_COHERE_INERT = frozenset(
  """
  layer_switch order_of_interleaved_layers position_embedding_type rotary_pct use_embedding_sharing
  use_gated_activation use_parallel_block use_parallel_embedding
  """.split()
)


def _falcon_usual(values: Config) -> Config:
  """Falcon describes its blocks by three keys, one of which overrides the others."""
  newer = bool(values.get("new_decoder_architecture"))
  heads = values.get("num_attention_heads", values.get("n_head"))
  several = newer or not values.get("multi_query", True)
  norms = values.get("num_ln_in_parallel_attn") or (2 if newer else 1)
  parallel = newer or bool(values.get("parallel_attn", True))
  width = values.get("hidden_size")
  usual = {
    "num_attention_heads": heads,
    "num_hidden_layers": values.get("num_hidden_layers", values.get("n_layer")),
    "num_key_value_heads": (values.get("num_kv_heads") if newer else None) or heads if several else 1,
    "intermediate_size": values.get("ffn_hidden_size") or (4 * width if isinstance(width, int) else None),
    "parallel_attn": parallel,
    "shared_norm": parallel and norms == 1,
  }
  own = (
    "n_head", "n_layer", "num_kv_heads", "ffn_hidden_size", "multi_query", "new_decoder_architecture",
    "num_ln_in_parallel_attn",
  )  # fmt: skip
  return {key: value for key, value in values.items() if key not in own} | usual


def _falcon_own(values: Fields) -> Fields:
  """In terms of the newer models' keys, which can express everything except a block that is not parallel."""
  values = {key: value for key, value in values.items() if key != "head_dim"}  # follows from the others
  shared, parallel = values.pop("shared_norm"), values["parallel_attn"]
  several = values.pop("num_key_value_heads")
  return values | {
    "ffn_hidden_size": values.pop("intermediate_size"),
    "new_decoder_architecture": parallel,
    "multi_query": several == 1,
    "num_kv_heads": several,
    "num_ln_in_parallel_attn": 1 if shared else 2,
  }


LAYER_NORM_FAMILIES: dict[str, Family] = {
  "cohere": Family(
    "CohereForCausalLM",
    rows.COHERE,
    fields=_COHERE_FIELDS,
    keys=_COHERE_KEYS,
    aliases=_EPS,
    fixed={"use_qk_norm": _NORM_OF_EACH_HEAD},
    defaults=_COHERE_DEFAULTS | {"rope_theta": 500_000.0},
    interleaved=True,
  ),
  "cohere2": Family(
    "Cohere2ForCausalLM",
    rows.COHERE,
    fields=_COHERE_FIELDS,
    keys=_COHERE_KEYS,
    aliases=_EPS,
    required={"sliding_window": "it must be given: without it, there is no rotary embedding"},
    defaults=_COHERE_DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": 4},
    inert=_COHERE_INERT,
    window="layers",
    is_local=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
    local_rope="alone",
    interleaved=True,
  ),
  "stablelm": Family(
    "StableLmForCausalLM",
    rows.STABLELM,
    fields=_BIASED,
    keys=(
      Key("use_qkv_bias", ("qkv_bias",), "flag"),
      Key("use_parallel_residual", ("parallel", "shared_norm"), "flag"),
    ),
    aliases=_EPS,
    fixed={"qk_layernorm": _NORM_OF_EACH_HEAD},
    defaults={
      "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 0,
      "eos_token_id": 0, "partial_rotary_factor": 0.25,
    },
  ),
  "phi": Family(
    "PhiForCausalLM",
    rows.PHI,
    fields=_BIASED | dict.fromkeys((*_ALL_BIASES, "head_bias", "parallel", "shared_norm"), True) | {"mlp": "plain"},
    aliases=_EPS,
    fixed={"qk_layernorm": _NORM_OF_EACH_HEAD},
    defaults={"rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
  ),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    rows.GPT_NEOX,
    fields=_BIASED | {"mlp": "plain", "mlp_bias": True},
    keys=(_ATTENTION_BIAS, Key("use_parallel_residual", ("parallel",), "flag")),
    aliases=_EPS | {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    defaults={
      "rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "bos_token_id": 0,
      "attention_bias": True, "use_parallel_residual": True,
    },
    dropped={r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias": "a causal mask"},
  ),
  "falcon": Family(
    "FalconForCausalLM",
    rows.FALCON,
    fields=_BIASED | {"mlp": "plain"},
    keys=(
      Key("bias", _ALL_BIASES, "flag"),
      Key("parallel_attn", ("parallel",), "flag"),
      Key("shared_norm", ("shared_norm",), "flag"),
    ),
    aliases={"layer_norm_epsilon": "rms_norm_eps"},
    spelling=Spelling(_falcon_usual, _falcon_own),
    fixed={
      "alibi": Fixed((False,), "ALiBi"),
      "apply_residual_connection_post_layernorm": Fixed((False,), "a residual connection after the norm"),
    },
    defaults={
      "rms_norm_eps": 1e-5, "activation": "gelu", "bos_token_id": 11, "eos_token_id": 11, "tie_word_embeddings": True,
    },
    activation="activation",
  ),
  "starcoder2": Family(
    "Starcoder2ForCausalLM",
    rows.STARCODER2,
    fields=_BIASED | {"mlp": "plain"},
    keys=(Key("use_bias", _ALL_BIASES, "flag"),),
    aliases={"norm_epsilon": "rms_norm_eps"},
    fixed={
      "mlp_type": Fixed(("default",), "another MLP"),
      "norm_type": Fixed(("layer_norm",), "another norm"),
    },
    defaults={
      "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "use_bias": True,
      "hidden_act": "gelu_pytorch_tanh", "bos_token_id": 50_256, "eos_token_id": 50_256, "tie_word_embeddings": True,
    },
    window="all",
  ),
  "nemotron": Family(
    "NemotronForCausalLM",
    rows.NEMOTRON,
    fields=_BIASED | {"norm_about_one": True, "mlp": "plain"},
    keys=(_ATTENTION_BIAS, Key("mlp_bias", ("mlp_bias",), "flag")),
    aliases={"norm_eps": "rms_norm_eps"},
    defaults={
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "relu2", "partial_rotary_factor": 0.5,
      "bos_token_id": 2, "eos_token_id": 3,
    },
  ),
}  # fmt: skip
"""By ``model_type``."""
