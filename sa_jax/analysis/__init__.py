"""Choosing what to share."""

from sa_jax.analysis.similarity import layer_similarity

__all__ = ["layer_similarity"]
