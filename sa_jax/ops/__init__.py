"""Pure functions on arrays: the mathematics, with no Flax in it."""

from sa_jax.ops.attention import (
  apply_weights,
  attend,
  attention_weights,
  backends,
  choose_backend,
  decode_apply,
  decode_attend,
  decode_weights,
  write_slot,
)
from sa_jax.ops.glu import gated_linear, has_gated_linear
from sa_jax.ops.loss import token_log_likelihoods
from sa_jax.ops.norm import rms_norm
from sa_jax.ops.rope import RopeConfig, apply_rope, rope_frequencies

__all__ = [
  "RopeConfig",
  "apply_rope",
  "apply_weights",
  "attend",
  "attention_weights",
  "backends",
  "choose_backend",
  "decode_apply",
  "decode_attend",
  "decode_weights",
  "gated_linear",
  "has_gated_linear",
  "rms_norm",
  "rope_frequencies",
  "token_log_likelihoods",
  "write_slot",
]
