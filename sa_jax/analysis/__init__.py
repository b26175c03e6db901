"""Choosing what to share, and recovering what it costs."""

from sa_jax.analysis.align import Aligned, align, fold
from sa_jax.analysis.judge import Judge, Text
from sa_jax.analysis.refit import Refit, Refitted, refit
from sa_jax.analysis.share import Shared, search_plan, share
from sa_jax.analysis.similarity import Similarity, drift, layer_similarity

__all__ = [
  "Aligned",
  "Judge",
  "Refit",
  "Refitted",
  "Shared",
  "Similarity",
  "Text",
  "align",
  "drift",
  "fold",
  "layer_similarity",
  "refit",
  "search_plan",
  "share",
]
