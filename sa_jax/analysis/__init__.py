"""Inspecting a model, choosing what to share, and recovering the loss: similarity, search, head alignment, refit.

The modules `align`, `refit` and `share` each contain a function of the same name, so import it from there.
"""

from sa_jax.analysis.inside import Captured, Edit, Inspection, Site, ablate, logit_lens, look, patch, steer
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.similarity import Similarity, drift, layer_similarity
from sa_jax.analysis.texts import Text

__all__ = [
  # Inspection and interventions.
  "Captured",
  "Edit",
  "Inspection",
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
