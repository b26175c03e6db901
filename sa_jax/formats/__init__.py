"""Reading and writing models: Hugging Face folders and GGUF files, to and from sa_jax checkpoints."""

from sa_jax.config import use_hf_spelling
from sa_jax.formats import hf_config
from sa_jax.formats.export import export
from sa_jax.formats.load import convert, from_pretrained, inspect
from sa_jax.formats.save import load, save
from sa_jax.formats.source import load_tokenizer
from sa_jax.formats.tokenizer import Tokenizer

__all__ = ["Tokenizer", "convert", "export", "from_pretrained", "inspect", "load", "load_tokenizer", "save"]

use_hf_spelling(hf_config)
