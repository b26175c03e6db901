"""Checkpoints in and out: Hugging Face folders and GGUF files, to and from sa_jax's own."""

from sa_jax.convert.export import export
from sa_jax.convert.load import convert, from_pretrained, inspect
from sa_jax.convert.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "convert", "export", "from_pretrained", "inspect", "load_tokenizer"]
