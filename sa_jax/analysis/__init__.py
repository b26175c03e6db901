"""Looking inside; choosing what to share, and recovering what it costs: similarity, search, head alignment, refit.

The modules `align`, `refit` and `share` each hold a function of their name, so they are imported from there.
"""

from sa_jax.analysis.inside import Captured, Edit, Looked, Site, ablate, logit_lens, look, patch, steer
from sa_jax.analysis.judge import Judge, Text
from sa_jax.analysis.similarity import Similarity, drift, layer_similarity

__all__ = [
  # Looking inside, and changing what is there.
  "Captured",
  "Edit",
  "Looked",
  "Site",
  "ablate",
  "logit_lens",
  "look",
  "patch",
  "steer",
  # Choosing what to share.
  "Judge",
  "Similarity",
  "Text",
  "drift",
  "layer_similarity",
]
