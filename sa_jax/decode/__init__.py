"""Generation: cache, prefill, the token loop on device, sampling."""

from sa_jax.decode.batcher import Batcher, Request
from sa_jax.decode.engine import DecodeState, Engine, Prompts, capacity_for, insert, pad_to, retire
from sa_jax.decode.generate import Generated, generate, stream
from sa_jax.decode.padding import right_pad, to_right_padded
from sa_jax.decode.sampling import Sampler
from sa_jax.nn.cache import Cache, LayerCache

__all__ = [
  "Batcher",
  "Cache",
  "DecodeState",
  "Engine",
  "Generated",
  "LayerCache",
  "Prompts",
  "Request",
  "Sampler",
  "capacity_for",
  "generate",
  "insert",
  "pad_to",
  "retire",
  "right_pad",
  "stream",
  "to_right_padded",
]
