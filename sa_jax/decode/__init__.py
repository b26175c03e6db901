"""Generation: cache, prefill, the token loop on device, sampling."""

from sa_jax.decode.batcher import Batcher, Request
from sa_jax.decode.engine import DecodeState, admit, bucket, capacity_for, decode, insert, prefill, retire, row_keys
from sa_jax.decode.generate import Generated, generate, stream
from sa_jax.decode.padding import right_pad, to_right_padded
from sa_jax.decode.sampling import Sampler
from sa_jax.nn.cache import Cache, LayerCache

__all__ = [
  "Batcher",
  "Cache",
  "DecodeState",
  "Generated",
  "LayerCache",
  "Request",
  "Sampler",
  "admit",
  "bucket",
  "capacity_for",
  "decode",
  "generate",
  "insert",
  "prefill",
  "retire",
  "right_pad",
  "row_keys",
  "stream",
  "to_right_padded",
]
