"""Pictures, as PNG. Needs the extra ``plots``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.plan import SharingPlan


def similarity_map(similarity: Any, path: Path, *, title: str, plan: SharingPlan | None = None) -> None:
  """Draws a layer-to-layer similarity as a heat map.

  Args:
    similarity: ``[L, L]``.
    path: the PNG to write.
    title: above the picture.
    plan: outlines its groups.

  Raises:
    ValueError: if matplotlib is not installed.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
  except ImportError:
    raise ValueError("pictures need matplotlib: pip install 'sa-jax[plots]'") from None
  values = np.asarray(similarity)
  figure = Figure(figsize=(7, 6), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  image = axes.imshow(values, origin="lower", cmap="viridis", vmin=min(0.0, float(values.min())), vmax=1.0)
  figure.colorbar(image, ax=axes, label="cosine similarity of attention weights")
  axes.set(title=title, xlabel="layer", ylabel="layer")
  if plan is not None:
    for anchor, followers in plan.groups:
      if followers:
        size = len(followers) + 1
        axes.add_patch(Rectangle((anchor - 0.5, anchor - 0.5), size, size, fill=False, edgecolor="white", linewidth=2))
  figure.savefig(path)
