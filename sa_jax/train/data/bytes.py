"""A byte-level tokenizer for models trained from scratch."""

from __future__ import annotations

import tokenizers

from sa_jax.formats import Tokenizer
from sa_jax.train.data.sources import END_OF_TEXT

BYTE_VOCABULARY = 257
"""256 bytes, then the end-of-text token."""


def byte_tokenizer() -> Tokenizer:
  """A byte-level tokenizer: token ``b`` is byte ``b`` of the UTF-8 text, and token 256 ends a text."""
  vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
  return Tokenizer(backend, None, (("eos_token", END_OF_TEXT),))


def _byte_characters() -> list[str]:
  """The printable characters by which byte-level tokenizers represent bytes (GPT-2's table)."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]
