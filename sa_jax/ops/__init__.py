"""Pure functions on arrays: the mathematics, with no Flax in it."""

from sa_jax.ops.attention import (
  KEPT,
  AttentionSpec,
  Backend,
  Rows,
  apply_weights,
  attend,
  attention_weights,
  backends,
  check_shapes,
  choose_backend,
  decode_apply,
  decode_attend,
  decode_follow,
  decode_weights,
  register_backend,
  write_slot,
)
from sa_jax.ops.head import logits
from sa_jax.ops.linear import gated_linear, has_linear_kernels, linears
from sa_jax.ops.loss import ToLogits, distillation_loss, next_token_loss, token_log_likelihoods
from sa_jax.ops.norm import layer_norm, rms_norm, rms_norm_about_one
from sa_jax.ops.quantize import Int8, Stored
from sa_jax.ops.rope import RopeConfig, apply_rope, grow_queries, rope_frequencies

__all__ = [
  "KEPT",
  "AttentionSpec",
  "Backend",
  "ToLogits",
  "Int8",
  "RopeConfig",
  "Rows",
  "Stored",
  "apply_rope",
  "apply_weights",
  "attend",
  "attention_weights",
  "backends",
  "check_shapes",
  "choose_backend",
  "decode_apply",
  "decode_attend",
  "decode_follow",
  "decode_weights",
  "distillation_loss",
  "gated_linear",
  "grow_queries",
  "has_linear_kernels",
  "layer_norm",
  "linears",
  "logits",
  "next_token_loss",
  "register_backend",
  "rms_norm",
  "rms_norm_about_one",
  "rope_frequencies",
  "token_log_likelihoods",
  "write_slot",
]
