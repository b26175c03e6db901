"""Measuring what sharing costs a model. The adapter for lm-eval is in `sa_jax.evaluation.lm`, not imported here."""

from sa_jax.evaluation.perplexity import Perplexity, perplexity, rare_words_unknown, rows_of
from sa_jax.evaluation.scoring import Scored, Scorer

__all__ = ["Perplexity", "Scored", "Scorer", "perplexity", "rare_words_unknown", "rows_of"]
