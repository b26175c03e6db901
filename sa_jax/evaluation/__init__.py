"""Measuring the quality that sharing costs. `sa_jax.evaluation.lm`, the lm-eval adapter, is not imported here."""

from sa_jax.evaluation.perplexity import Perplexity, perplexity, rare_words_unknown, rows_of
from sa_jax.evaluation.scoring import Scored, Scorer

__all__ = ["Perplexity", "Scored", "Scorer", "perplexity", "rare_words_unknown", "rows_of"]
