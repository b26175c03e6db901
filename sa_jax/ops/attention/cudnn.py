"""NVIDIA's fused attention, through JAX."""

import jax

from sa_jax.ops.attention.spec import AttentionSpec


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lengths: jax.Array | None,
  spec: AttentionSpec,
  segments: None = None,
  offset: None = None,
) -> jax.Array:
  """cuDNN flash attention; O(T) memory. Shapes as in `sa_jax.ops.attend`, without segments and offset.

  The mask is given as a flag and lengths, never as an array, which costs cuDNN a factor of 2.6.
  """
  del segments, offset
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=spec.scale,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=None if spec.window is None else (spec.window - 1, 0),
    implementation="cudnn",
  )
