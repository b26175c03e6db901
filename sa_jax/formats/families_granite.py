"""Config keys common to all Granite models."""

from __future__ import annotations

from sa_jax.formats.family import Key

GRANITE_KEYS = (
  Key("attention_bias", ("qkv_bias", "output_bias"), "flag"),
  Key("embedding_multiplier", ("embedding_scale",), "number"),
  Key("residual_multiplier", ("residual_scale",), "number"),
  Key("attention_multiplier", ("attention_scale",), "number"),
  Key("logits_scaling", ("logits_scale",), "inverse"),
)
GRANITE_DEFAULTS = dict.fromkeys([key.name for key in GRANITE_KEYS if key.kind != "flag"], 1.0)
