"""Values in notebooks: what their HTML says, and that it is well-formed, small and readable without colours."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import Similarity
from sa_jax.analysis.mixture import Mixture
from sa_jax.analysis.refit import Refitted, Report
from sa_jax.analysis.search import Found
from sa_jax.analysis.share import Shared
from sa_jax.display import count, maps_picture
from sa_jax.evaluation import Perplexity

PLAN = sa_jax.SharingPlan.parse("1:2-3,5:6", 8)


def parsed(value):
  """What a value shows, as a tree: that it can be read as XML means that no text was left unescaped."""
  return ElementTree.fromstring(f"<div>{value._repr_html_()}</div>")


def cells(tree):
  return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_a_plan_is_a_row_of_discs_and_rings():
  tree = parsed(PLAN.with_head_maps({2: (1, 0)}))
  svg = "{http://www.w3.org/2000/svg}"
  fills = [circle.get("fill") for circle in tree.iter(f"{svg}circle")]
  assert fills == ["currentColor" if PLAN.is_anchor(layer) else "none" for layer in range(8)]
  assert [text.text for text in tree.iter(f"{svg}text")] == ["0", "5"]
  (title,) = tree.iter(f"{svg}title")
  assert title.text == "1:2-3,5:6: 3 of 8 layers follow, 1 of them with a head map"


def test_every_number_of_a_cost_is_in_its_table():
  counted = sa_jax.cost(sa_jax.ModelConfig.preset("llama-2-7b"), None, batch=1, seq_len=4096)
  rows = dict(cells(parsed(counted)))
  assert len(rows) == 7
  assert rows["parameters"] == "6.74 G"
  assert rows["KV cache bytes"] == "2.15 GB"


def test_maps_are_images_of_one_pixel_an_entry():
  image = pytest.importorskip("matplotlib.image")
  tree = ElementTree.fromstring(maps_picture([("<cosine>", np.array([[1.0, 0.5], [-0.2, 0.0]]))]))
  (picture,) = tree.iter("img")
  assert picture.get("alt").startswith("<cosine>, 2 × 2 layers")
  pixels = image.imread(io.BytesIO(base64.b64decode(picture.get("src").split(",")[1]))) * 255
  np.testing.assert_allclose(pixels[0, 0], [0, 77, 64], atol=0.01)
  np.testing.assert_allclose(pixels[0, 1], [128, 166, 160], atol=0.51)
  np.testing.assert_allclose(pixels[1], 255)


def test_a_similarity_shows_its_cosines_with_heads_and_without():
  values = Similarity(*(np.full((30, 30, 2), 0.3) for _ in range(4)), *(np.zeros((30, 2)) for _ in range(2)))
  for each in (values, values.mean()):
    assert len(list(parsed(each).iter("img"))) == 2
    assert len(each._repr_html_()) < 4000


def test_results_are_tables():
  scored, worse = Perplexity(12.5, 2.5257, 1000), Perplexity(15.0, 2.708, 1000)
  assert cells(parsed(scored))[0] == ["perplexity", "12.50"]
  found = Found(PLAN, np.array([2.6]), 0.0743)
  assert cells(parsed(found)) == [["loss over dense, nats per token", "0.0743"]]
  model = sa_jax.Transformer(sa_jax.ModelConfig.preset("smollm2-135m"), sa_jax.SharingPlan.parse("1:2", 30))
  shared = Shared(model, {}, {"<text>": scored}, {"<text>": worse}, [], Mixture(model.plan))
  assert cells(parsed(shared)) == [["perplexity", "dense", "shared"], ["<text>", "12.50", "15.00"]]
  refitted = Refitted(model, {}, [Report(2, "attention", 0.25, 0.0625, 0.1)], model.plan)
  assert cells(parsed(refitted))[1] == ["layer 2, attention", "25.0%", "6.2%"]


def test_a_bar_takes_what_functions_tell_it(capsys):
  with sa_jax.progress("reading") as bar:
    bar(1, 2)
  assert capsys.readouterr() == ("", "")  # no terminal, no notebook


def test_counts_have_plurals():
  assert [count(number, "row") for number in (0, 1, 1140)] == ["0 rows", "1 row", "1,140 rows"]
