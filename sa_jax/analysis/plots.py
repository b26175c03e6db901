"""Plots, as PNG. Needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
  """Checks, before long work, that plots can be made.

  Raises:
    UserError: if matplotlib is not installed.
  """
  new_figure(1, 1)


def save(figure: Figure, path: Path) -> None:
  """Writes a figure as PNG, whatever the file's suffix.

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
    raise UserError(f"plots need matplotlib ({error}): pip install 'sa-jax[plots]'") from None
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


class Scale(NamedTuple):
  """The scale of a map.

  Attributes:
    label: name of the quantity.
    highest: upper end of the colour scale.
    distance: whether larger means less similar. In all maps, light means similar.
  """

  label: str
  highest: float = 1.0
  distance: bool = False


COSINE = Scale("cosine similarity of attention weights")


def _heat_map(axes: Axes, values: np.ndarray, title: str, lowest: float, scale: Scale) -> AxesImage:
  axes.set(title=title, xlabel="layer", ylabel="layer")
  colours = "viridis_r" if scale.distance else "viridis"
  return axes.imshow(values, origin="lower", cmap=colours, vmin=lowest, vmax=scale.highest)


def _add_scale(figure: Figure, axes: Axes, image: AxesImage, scale: Scale) -> None:
  figure.colorbar(image, ax=axes, label=f"{scale.label} (light: alike)")


def similarity_map(
  similarity: ArrayLike,
  path: Path,
  *,
  title: str,
  scale: Scale = COSINE,
  plan: SharingPlan | None = None,
) -> None:
  """Plots a layer-by-layer similarity matrix as a heat map; light means similar.

  Args:
    similarity: ``[L, L]``.
    path: the PNG to write.
    title: the plot's title.
    scale: the scale of the values.
    plan: if given, its groups are outlined.

  Raises:
    UserError: if matplotlib is not installed.
  """
  values = np.asarray(similarity)
  figure = new_figure(7, 6)
  axes = figure.subplots()
  image = _heat_map(axes, values, title, min(0.0, float(values.min())), scale)
  _add_scale(figure, axes, image, scale)
  if plan is not None:
    from matplotlib.patches import Rectangle

    for anchor, followers in plan.groups:
      if followers:
        size = len(followers) + 1
        axes.add_patch(Rectangle((anchor - 0.5, anchor - 0.5), size, size, fill=False, edgecolor="white", linewidth=2))
  save(figure, path)


def similarity_animation(similarities: Mapping[str, ArrayLike], path: Path) -> None:
  """Plots the similarity maps of several checkpoints as one animated GIF.

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
  image = _heat_map(axes, maps[titles[0]], titles[0], lowest, COSINE)
  _add_scale(figure, axes, image, COSINE)

  def draw(frame: int) -> list[Artist]:
    image.set_data(maps[titles[frame]])
    axes.set_title(titles[frame])
    return [image]

  with new_file(path) as file:
    FuncAnimation(figure, draw, frames=len(titles)).save(file, writer=PillowWriter(fps=2))


def pareto_front(
  points: Mapping[str, Sequence[tuple[float, float]]],
  path: Path,
  *,
  title: str,
  labels: Mapping[str, Sequence[str]] | None = None,
) -> None:
  """Plots KV bytes saved against added loss, one line per search, each starting at the dense model.

  Args:
    points: name → (fraction of the KV cache saved, added nats per token), in order.
    path: the PNG to write.
    title: the plot's title.
    labels: name → the labels of its points.

  Raises:
    UserError: if matplotlib is not installed.
  """
  figure = new_figure(7, 5)
  axes = figure.subplots()
  axes.axhline(0, color="grey", linewidth=1)
  axes.annotate("dense", (0, 0), (6, -12), textcoords="offset points", color="grey")
  for name, line in points.items():
    saved, added = ([0.0, *(100 * saved for saved, _ in line)], [0.0, *(added for _, added in line)])
    axes.plot(saved, added, marker="o", label=name)
    for at, label in enumerate((labels or {}).get(name, ())):
      # Labels of points in the right half go to the left, so that they stay inside the plot.
      side = (-6, "right") if saved[at + 1] > max(saved) / 2 else (6, "left")
      axes.annotate(label, (saved[at + 1], added[at + 1]), (side[0], 6), textcoords="offset points", ha=side[1])
  axes.set(title=title, xlabel="KV cache saved, per cent", ylabel="loss added, nats per token")
  axes.margins(y=0.2)  # two-line labels
  axes.grid(alpha=0.3)
  axes.legend()
  save(figure, path)


def perplexity_bars(results: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> None:
  """Plots a shared model's perplexity relative to the dense model's, one bar per text, labelled with the numbers.

  Args:
    results: text name → perplexities ``dense``, ``shared``, and ``undistilled`` after a distillation.
    path: the PNG to write.
    title: the plot's title.

  Raises:
    UserError: if matplotlib is not installed.
  """
  figure = new_figure(7, 5)
  axes = figure.subplots()
  axes.axhline(0, color="grey", linewidth=1)
  stages = {"undistilled": "refitted", "shared": "distilled"}
  if not all("undistilled" in each for each in results.values()):
    stages = {"shared": "shared"}
  width = 0.8 / len(stages)
  for number, (stage, label) in enumerate(stages.items()):
    places = np.arange(len(results)) + (number - (len(stages) - 1) / 2) * width
    heights = [100 * (each[stage] / each["dense"] - 1) for each in results.values()]
    bars = axes.bar(places, heights, 0.9 * width, label=label)
    axes.bar_label(bars, [f"{each[stage]:.2f}" for each in results.values()], padding=2)
  names = [f"{name}\ndense {each['dense']:.2f}" for name, each in results.items()]
  axes.set(title=title, ylabel="perplexity over the dense model's, per cent")
  axes.set_xticks(np.arange(len(results)), names)
  axes.set_xlim(-0.8, len(results) - 0.2)
  axes.margins(y=0.15)
  axes.grid(alpha=0.3, axis="y")
  axes.set_axisbelow(True)
  axes.legend()
  save(figure, path)
