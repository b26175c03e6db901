"""What pictures say: colours, labels, a baseline."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from sa_jax.analysis import plots


@pytest.fixture
def drawn(monkeypatch):
  """The axes of the figure that is saved."""
  kept = []
  monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))
  return lambda: kept.pop().axes


def test_light_is_alike_in_all_maps(drawn, tmp_path):
  colours = []
  for distance, alike in ((False, 1.0), (True, 0.0)):
    plots.similarity_map(np.full((3, 3), 0.5), tmp_path, title="a", scale=plots.Scale("b", distance=distance))
    axes, scale = drawn()
    (image,) = axes.images
    colours.append(image.cmap(image.norm(alike)))
    assert scale.get_ylabel() == "b (light: alike)"
  assert colours[0] == colours[1]
  assert sum(colours[0][:3]) > 2  # yellow


def test_one_plan_is_beside_dense(drawn, tmp_path):
  plots.pareto_front({"greedy": [(0.05, 0.03)]}, tmp_path, title="a", labels={"greedy": ["25:26-27"]})
  (axes,) = drawn()
  line = next(line for line in axes.lines if line.get_label() == "greedy")
  np.testing.assert_allclose(line.get_xydata(), [[0, 0], [5, 0.03]])
  assert {text.get_text() for text in axes.texts} == {"dense", "25:26-27"}


def test_bars_of_perplexity_have_numbers_and_begin_at_dense(drawn, tmp_path):
  found = {"a": {"dense": 20.0, "shared": 21.0}, "b": {"dense": 10.0, "shared": 9.5}}
  plots.perplexity_bars(found, tmp_path, title="t")
  (axes,) = drawn()
  np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [5, -5])
  assert [text.get_text() for text in axes.texts] == ["21.00", "9.50"]
  assert [text.get_text() for text in axes.get_xticklabels()] == ["a\ndense 20.00", "b\ndense 10.00"]
  plots.perplexity_bars({"a": {"dense": 20.0, "undistilled": 22.0, "shared": 21.0}}, tmp_path, title="t")
  (axes,) = drawn()
  assert [text.get_text() for text in axes.get_legend().get_texts()] == ["refitted", "distilled"]
