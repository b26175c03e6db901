"""Attention: one definition, several backends.

`attend` computes ``softmax(q kᵀ / sqrt(H) + mask) v`` without returning the weights; `attention_weights` and
`apply_weights` are its two halves. Called with an anchor's q and k and a follower's v, `attend` *is* Shared Attention.
"""

from sa_jax.ops.attention.decode import decode_apply, decode_attend, decode_follow, decode_weights, write_slot
from sa_jax.ops.attention.dispatch import Backend, attend, backends, check_shapes, choose_backend, register_backend
from sa_jax.ops.attention.group import Followers, Parts, Tap, follow, taps
from sa_jax.ops.attention.pages import Pages
from sa_jax.ops.attention.reference import apply_weights, attention_weights
from sa_jax.ops.attention.rows import DEMANDS, Rows
from sa_jax.ops.attention.spec import KEPT, AttentionSpec

__all__ = [
  "KEPT",
  "AttentionSpec",
  "Backend",
  "DEMANDS",
  "Followers",
  "Pages",
  "Parts",
  "Rows",
  "Tap",
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
  "follow",
  "register_backend",
  "taps",
  "write_slot",
]
