"""Measuring what sharing costs a model."""

from sa_jax.evaluation.perplexity import Perplexity, perplexity, rows_of

__all__ = ["Perplexity", "perplexity", "rows_of"]
