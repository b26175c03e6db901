"""A byte-level tokenizer for models trained from scratch."""

from __future__ import annotations

import tokenizers

from sa_jax.formats import Tokenizer
from sa_jax.formats.byte_level import LETTERS
from sa_jax.train.data.sources import END_OF_TEXT

BYTE_VOCABULARY = 257
"""256 bytes, then the end-of-text token."""


def byte_tokenizer() -> Tokenizer:
  """A byte-level tokenizer: token ``b`` is byte ``b`` of the UTF-8 text, and token 256 ends a text."""
  vocabulary = {character: byte for byte, character in enumerate(LETTERS)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
  return Tokenizer(backend, None, (("eos_token", END_OF_TEXT),))
