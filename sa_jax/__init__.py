"""Shared Attention for JAX: let neighbouring layers of an LLM share attention weights.

Liao & Vargas, "Beyond KV Caching: Shared Attention for Efficient LLMs", arXiv 2407.12866.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from sa_jax import nn, ops, plans
from sa_jax.config import ModelConfig
from sa_jax.costs import Cost, cost
from sa_jax.decode import Generated, generate
from sa_jax.display import progress
from sa_jax.errors import UserError
from sa_jax.evaluation import Perplexity, perplexity, rows_of
from sa_jax.formats import Tokenizer, convert, export, from_pretrained, inspect, load, load_tokenizer, save
from sa_jax.nn import Transformer
from sa_jax.params import prune, stack, stack_unpruned, unstack
from sa_jax.plan import SharingPlan

if TYPE_CHECKING:
  from sa_jax import analysis as analysis
  from sa_jax import train as train

__version__ = "0.2.0"

_LATER = ("analysis", "train")
"""Modules that are imported on first access."""


def __getattr__(name: str) -> ModuleType:
  if name not in _LATER:
    raise AttributeError(f"module 'sa_jax' has no attribute {name!r}")
  return importlib.import_module(f"sa_jax.{name}")


def __dir__() -> list[str]:
  return sorted({*globals(), *_LATER})


__all__ = [
  # Models, plans and their cost.
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
  # Generation and evaluation.
  "generate",
  "Generated",
  "perplexity",
  "Perplexity",
  "rows_of",
  "progress",
  # Parameter layouts.
  "prune",
  "stack",
  "stack_unpruned",
  "unstack",
  # Errors that the user can fix.
  "UserError",
  # Building blocks.
  "nn",
  "ops",
  # Known plans.
  "plans",
]
