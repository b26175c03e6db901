"""Measuring what sharing costs a model."""

from sa_jax.evaluation.perplexity import Perplexity, perplexity, rare_words_unknown, rows_of

__all__ = ["Perplexity", "perplexity", "rare_words_unknown", "rows_of"]
