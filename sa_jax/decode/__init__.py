"""Generation: prefill, the KV cache, the token loop on device, sampling."""

from sa_jax.decode.admission import Request
from sa_jax.decode.batcher import Batcher
from sa_jax.decode.beams import Beams, Found, beam_search
from sa_jax.decode.detokenizer import Detokenizer
from sa_jax.decode.engine import CachedPrefixes, Engine, capacity_for, pad_to
from sa_jax.decode.generate import Generated, generate, stream
from sa_jax.decode.padding import right_pad, to_right_padded
from sa_jax.decode.prefix import PromptCache
from sa_jax.decode.processors import (
  Allow,
  Automaton,
  Ban,
  Bias,
  CountPenalty,
  HostMask,
  NotBefore,
  Processor,
  RepetitionPenalty,
  Start,
)
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.serving import Serving
from sa_jax.decode.settings import Settings, TextSettings
from sa_jax.decode.speculative import Draft, Speculated, SpeculativeEngine, SpeculativeState, accept, speculate
from sa_jax.decode.state import DecodeState, Drawn, Prompts, insert, retire
from sa_jax.decode.text import Text, continue_texts, stream_text
from sa_jax.nn.cache import Cache, LayerCache

__all__ = [
  # Prompts in, tokens out.
  "Generated",
  "generate",
  "stream",
  # Texts in, texts out.
  "Detokenizer",
  "Text",
  "TextSettings",
  "continue_texts",
  "stream_text",
  # Speculative decoding.
  "Draft",
  "Settings",
  "Speculated",
  "SpeculativeEngine",
  "SpeculativeState",
  "accept",
  "speculate",
  # Beam search.
  "Beams",
  "Found",
  "beam_search",
  # Sampling.
  "Sampler",
  "Processor",
  "Start",
  "Allow",
  "Automaton",
  "Ban",
  "Bias",
  "CountPenalty",
  "HostMask",
  "NotBefore",
  "RepetitionPenalty",
  # A shared prefix, prefilled once.
  "PromptCache",
  # Continuous batching.
  "Batcher",
  "Request",
  "Serving",
  # The compiled programs.
  "CachedPrefixes",
  "Cache",
  "DecodeState",
  "Drawn",
  "Engine",
  "LayerCache",
  "Prompts",
  "insert",
  "retire",
  # Padding.
  "capacity_for",
  "pad_to",
  "right_pad",
  "to_right_padded",
]
