"""The language model in a multimodal ``config.json``, and model types that plans do not support."""

from __future__ import annotations

from sa_jax.formats.reader import Config

_TEXT_KEYS = ("text_config", "llm_config")
# Text models that are a family under another name.
_TEXT_TYPES = {
  "qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2",
  "qwen3_vl": "qwen3", "qwen3_vl_text": "qwen3",
}  # fmt: skip
# Values from the multimodal model's top level, if its text part lacks them.
_OUTER = (
  "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
  "quantization_config", "shared_attention", "transformers_version",
)  # fmt: skip
# Multimodal models that transformers ties if their text part says so, regardless of the top level.
_TIED_IF_EITHER = """
  fast_vlm glm4v hunyuan_vl llava llava_next_video llava_onevision paddleocr_vl qwen2_vl qwen2_5_vl video_llama_3
""".split()
# Token ids and objects for images and video in the text.
_OF_PICTURES = ("vision_", "image_", "video_", "audio_", "mm_", "boi_", "eoi_", "boa_", "eoa_")

_SHARING = (
  "its last layers already reuse the keys and values of earlier ones (num_kv_shared_layers), so followers, which have "
  "their own values, do not apply"
)
_OTHER_HEADS = (
  "its global and local layers have different head dimensions, and some use keys as values (attention_k_eq_v), so "
  "followers, which have their own values and their anchor's heads, do not apply"
)
_MIXED = "some or all of its layers are not attention layers, and have no attention weights to share"
_LATENT = "multi-head latent attention is not implemented"
_ALIBI = "ALiBi is not implemented"
_LEARNT = "learned position embeddings are not implemented"
_CROSS = "some of its layers are cross-attention"
_REFUSED = {
  _MIXED: """
    bamba bailing_hybrid falcon_h1 falcon_mamba jamba kimi_linear lfm2 lfm3 mamba mamba2 nemotron_h
    olmo_hybrid qwen3_5 qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2
  """,
  _LATENT: "deepseek_v2 deepseek_v3 deepseek_v32 minicpm3 youtu",
  _ALIBI: "bloom mpt",
  _LEARNT: "biogpt gpt2 gpt_bigcode gpt_neo opt",
  _CROSS: "mllama mllama_text_model",
}
_REASONS = {model_type: reason for reason, types in _REFUSED.items() for model_type in types.split()}
_SHARE_KEYS = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified")


def refusal(values: Config) -> str | None:
  """Why plans do not support this model type, or None if there is no known reason."""
  model_type = values.get("model_type")
  if not isinstance(model_type, str):
    return None
  if model_type in _SHARE_KEYS:
    return _OTHER_HEADS if values.get("num_kv_shared_layers") == 0 else _SHARING
  return _REASONS.get(model_type)


def text_part(values: Config) -> Config:
  """The config of the language model inside a multimodal one; other configs unchanged."""
  found = next((key for key in _TEXT_KEYS if isinstance(values.get(key), dict)), None)
  model_type = values.get("model_type")
  if not isinstance(model_type, str) or (found is None and model_type not in _TEXT_TYPES):
    return values
  if found is None:
    inner = {key: value for key, value in values.items() if not key.startswith(_OF_PICTURES)}
  else:
    inner = {key: values[key] for key in _OUTER if values.get(key) is not None}
    inner |= {key: value for key, value in values[found].items() if value is not None or key not in inner}
    # The head belongs to the whole model, whose value takes precedence.
    if isinstance(tied := values.get("tie_word_embeddings"), bool):
      inner["tie_word_embeddings"] = tied or (model_type in _TIED_IF_EITHER and inner["tie_word_embeddings"])
  text_type = inner.get("model_type", model_type)
  text_type = _TEXT_TYPES.get(text_type, text_type) if isinstance(text_type, str) else text_type
  return {**inner, "model_type": text_type}
