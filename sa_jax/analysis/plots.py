"""Pictures, as PNG. Needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from sa_jax.errors import UserError
from sa_jax.files import new_file
from sa_jax.plan import SharingPlan

if TYPE_CHECKING:
  from matplotlib.artist import Artist
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.image import AxesImage


def check_installed() -> None:
  """Checks, before the work that pictures are of, that they can be drawn.

  Raises:
    UserError: if matplotlib is not installed.
  """
  new_figure(1, 1)


def save(figure: Figure, path: Path) -> None:
  """Writes a figure as PNG, whatever the file's name ends in.

  Raises:
    UserError: if it cannot be written.
  """
  with new_file(path) as file:
    figure.savefig(file, format="png")


def new_figure(width: float, height: float) -> Figure:
  """An empty figure that needs no display.

  Raises:
    UserError: if matplotlib is not installed.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError as error:
    raise UserError(f"pictures need matplotlib ({error}): pip install 'sa-jax[plots]'") from None
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _heat_map(axes: Axes, values: np.ndarray, title: str, lowest: float, highest: float) -> AxesImage:
  axes.set(title=title, xlabel="layer", ylabel="layer")
  return axes.imshow(values, origin="lower", cmap="viridis", vmin=lowest, vmax=highest)


def similarity_map(
  similarity: ArrayLike,
  path: Path,
  *,
  title: str,
  label: str = "cosine similarity of attention weights",
  highest: float = 1.0,
  plan: SharingPlan | None = None,
) -> None:
  """Draws a layer-to-layer similarity as a heat map.

  Args:
    similarity: ``[L, L]``.
    path: the PNG to write.
    title: above the picture.
    label: what the colours mean.
    highest: end of the colour scale.
    plan: outlines its groups.

  Raises:
    UserError: if matplotlib is not installed.
  """
  values = np.asarray(similarity)
  figure = new_figure(7, 6)
  axes = figure.subplots()
  image = _heat_map(axes, values, title, min(0.0, float(values.min())), highest)
  figure.colorbar(image, ax=axes, label=label)
  if plan is not None:
    from matplotlib.patches import Rectangle

    for anchor, followers in plan.groups:
      if followers:
        size = len(followers) + 1
        axes.add_patch(Rectangle((anchor - 0.5, anchor - 0.5), size, size, fill=False, edgecolor="white", linewidth=2))
  save(figure, path)


def similarity_animation(similarities: Mapping[str, ArrayLike], path: Path) -> None:
  """Draws the similarity maps of several checkpoints as one animated GIF.

  Args:
    similarities: title → ``[L, L]``, in order.
    path: the GIF to write.

  Raises:
    UserError: if matplotlib is not installed.
  """
  figure = new_figure(7, 6)
  from matplotlib.animation import FuncAnimation, PillowWriter

  axes = figure.subplots()
  maps = {title: np.asarray(values) for title, values in similarities.items()}
  lowest = min(0.0, *(float(values.min()) for values in maps.values()))
  titles = list(maps)
  image = _heat_map(axes, maps[titles[0]], titles[0], lowest, 1.0)
  figure.colorbar(image, ax=axes, label="cosine similarity of attention weights")

  def draw(frame: int) -> list[Artist]:
    image.set_data(maps[titles[frame]])
    axes.set_title(titles[frame])
    return [image]

  with new_file(path) as file:
    FuncAnimation(figure, draw, frames=len(titles)).save(file, writer=PillowWriter(fps=2))


def pareto_front(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str) -> None:
  """Draws KV bytes saved against loss added, one line a search.

  Args:
    points: name → (share of the KV cache saved, nats a token added), in order.
    path: the PNG to write.
    title: above the picture.

  Raises:
    UserError: if matplotlib is not installed.
  """
  figure = new_figure(7, 5)
  axes = figure.subplots()
  for name, line in points.items():
    axes.plot([100 * saved for saved, _ in line], [added for _, added in line], marker="o", label=name)
  axes.set(title=title, xlabel="KV cache saved, per cent", ylabel="loss added, nats a token")
  axes.grid(alpha=0.3)
  axes.legend()
  save(figure, path)
