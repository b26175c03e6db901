"""Checkpoints in and out: Hugging Face folders and GGUF files, to and from sa_jax's own."""

from sa_jax.formats.export import export
from sa_jax.formats.load import convert, from_pretrained, inspect
from sa_jax.formats.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "convert", "export", "from_pretrained", "inspect", "load_tokenizer"]
