"""Every family against transformers, or against its published architecture."""

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax.formats.load import describe
from sa_jax.sharding import abstract_params
from tests.formats import hf_models

torch = pytest.importorskip("torch")

TOKENS = np.random.default_rng(0).integers(2, 90, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module", params=hf_models.CONFIGS)
def family(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("families") / request.param
  return request.param, folder, hf_models.build(request.param, folder)


def logits(model, params, tokens=TOKENS):
  return np.asarray(model.apply({"params": params}, tokens))


def test_logits(family):
  _, folder, theirs = family
  with torch.no_grad():
    expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits(*sa_jax.from_pretrained(folder)), expected, atol=1e-4)


def test_greedy(family):
  _, folder, theirs = family
  model, params = sa_jax.from_pretrained(folder, layout="layers")
  prompt = torch.from_numpy(TOKENS).long()[:, :12]
  expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False)[:, 12:].numpy()
  found = sa_jax.generate(model, params, TOKENS[:, :12], max_new_tokens=32)
  np.testing.assert_array_equal(found.tokens, expected)


def test_every_parameter_is_counted_and_has_its_axes(family):
  _, folder, theirs = family
  model = describe(folder)
  assert sa_jax.cost(model.config, None).params == sum(leaf.numel() for leaf in theirs.parameters())
  is_leaf = lambda leaf: hasattr(leaf, "names")
  for leaf in jax.tree.leaves(abstract_params(model, boxed=True), is_leaf=is_leaf):
    assert len(leaf.names) == leaf.value.ndim
    assert {*leaf.names} <= dict(sa_jax.sharding.DEFAULT_RULES).keys()


@pytest.mark.parametrize("state", ["query_key", "attention_weights"])
def test_plan(family, state):
  import dataclasses

  name, folder, theirs = family
  if hf_models.PLANS[name] is None:
    pytest.skip("neighbouring layers of this family never see the same keys")
  model, params = sa_jax.from_pretrained(folder, hf_models.PLANS[name])
  model = model.clone(config=dataclasses.replace(model.config, attention_state=state))
  expected = hf_models.logits_under_plan(theirs, TOKENS, model.plan.source)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


@pytest.fixture(scope="module", params=hf_models.PUBLISHED)
def published(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("published") / request.param
  return folder, hf_models.Published(request.param, folder)


@pytest.mark.parametrize("plan", [None, "1:2-3"])
def test_published_logits(published, plan):
  folder, theirs = published
  model, params = sa_jax.from_pretrained(folder, plan)
  expected = theirs.logits(TOKENS, model.plan.source)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


def test_published_greedy(published):
  folder, theirs = published
  model, params = sa_jax.from_pretrained(folder, layout="layers")
  expected = theirs.greedy(TOKENS[:, :12], 32)
  found = sa_jax.generate(model, params, TOKENS[:, :12], max_new_tokens=32)
  np.testing.assert_array_equal(found.tokens, expected)
