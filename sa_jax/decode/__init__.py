"""Generation: cache, prefill, the token loop on device, sampling."""

from sa_jax.decode.engine import DecodeState, decode, prefill
from sa_jax.decode.generate import Generated, generate
from sa_jax.decode.padding import right_pad, to_right_padded
from sa_jax.decode.sampling import Sampler
from sa_jax.nn.cache import Cache, LayerCache

__all__ = [
  "Cache",
  "DecodeState",
  "Generated",
  "LayerCache",
  "Sampler",
  "decode",
  "generate",
  "prefill",
  "right_pad",
  "to_right_padded",
]
