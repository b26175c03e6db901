"""Shared Attention for JAX: let neighbouring layers of an LLM share attention weights.

Liao & Vargas, "Beyond KV Caching: Shared Attention for Efficient LLMs", arXiv 2407.12866.
"""

from sa_jax import nn, ops
from sa_jax.config import ModelConfig
from sa_jax.costs import Cost, cost
from sa_jax.decode import Generated, generate
from sa_jax.errors import UserError
from sa_jax.evaluation import Perplexity, perplexity, rows_of
from sa_jax.formats import Tokenizer, convert, export, from_pretrained, inspect, load, load_tokenizer, save
from sa_jax.nn import Transformer
from sa_jax.params import prune, stack, stack_unpruned, unstack
from sa_jax.plan import SharingPlan

__version__ = "0.1.0"

__all__ = [
  # What a model is, and which layers share.
  "ModelConfig",
  "SharingPlan",
  "Transformer",
  "cost",
  "Cost",
  # Checkpoints.
  "convert",
  "export",
  "from_pretrained",
  "inspect",
  "load",
  "load_tokenizer",
  "save",
  "Tokenizer",
  # Use.
  "generate",
  "Generated",
  "perplexity",
  "Perplexity",
  "rows_of",
  # Parameter layouts.
  "prune",
  "stack",
  "stack_unpruned",
  "unstack",
  # What a user did and can mend.
  "UserError",
  # Building blocks.
  "nn",
  "ops",
]
