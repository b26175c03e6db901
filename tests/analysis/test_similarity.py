"""Similarities against plain NumPy on the attention weights that the PyTorch reference computed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import nn
from sa_jax.analysis import similarity
from tests import tiny


def plain(weights, top_k, windows=None):
  """The definitions, on ``[L, B, N, T, T]``, one pair of layers at a time; ``windows`` of each layer, if it has one."""
  weights = weights.astype(np.float64)
  layers, batch, heads, length, _ = weights.shape
  windows = windows or [length] * layers
  names = ("cosine", "cosine_without_sink", "js_divergence", "top_k_overlap")
  out = {name: np.zeros((layers, layers, heads)) for name in names}
  entropy = lambda p: -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
  cosine = lambda a, b: np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
  for i in range(layers):
    for j in range(layers):
      for n in range(heads):
        p, q = weights[i, :, n], weights[j, :, n]
        out["cosine"][i, j, n] = cosine(p, q)
        out["cosine_without_sink"][i, j, n] = cosine(p[..., 1:], q[..., 1:])
        out["js_divergence"][i, j, n] = np.mean(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
        overlaps = [
          len(set(np.argsort(p[b, t])[-top_k:]) & set(np.argsort(q[b, t])[-top_k:])) / top_k
          for b in range(batch)
          for t in range(length)
          if top_k <= min(t + 1, windows[i], windows[j])
        ]
        out["top_k_overlap"][i, j, n] = np.mean(overlaps) if overlaps else 0
  out["entropy"] = entropy(weights).mean(axis=(1, 3))
  out["weighted_variance"] = np.zeros((layers, heads))
  for layer, window in enumerate(windows):
    seen = [min(t + 1, window) for t in range(length)]
    deviations = [(weights[layer, ..., t, t + 1 - s : t + 1] - 1 / s) ** 2 for t, s in enumerate(seen)]
    out["weighted_variance"][layer] = sum(d.sum(axis=(0, 2)) for d in deviations) / (batch * sum(seen))
  return out


def test_against_numpy_on_the_references_weights(reference):
  expected = tiny.arrays_of(reference / "expected.npz")
  followers = json.loads((reference / "sharing.json").read_text())["shared_layers"]
  layers = expected["attentions_unpadded"].shape[0]
  plan = sa_jax.SharingPlan.from_followers(layers, followers)
  model, params = sa_jax.from_pretrained(reference, plan, layout="layers")
  got = similarity.layer_similarity(model, params, expected["input_ids"], top_k=4, block=8)
  for name, want in plain(expected["attentions_unpadded"], 4).items():
    np.testing.assert_allclose(getattr(got, name), want, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(got.mean().cosine, got.cosine.mean(axis=-1))


def test_local_layers_see_their_window():
  model = tiny.model("0:1", num_layers=4, window=5, local_layers=(2, 3))
  params, tokens = tiny.params(model), tiny.tokens(2, 12)
  weights = np.stack([state.weights() for state in model.apply({"params": params}, tokens, method="states")])
  for top_k in (3, 7):
    got = similarity.layer_similarity(model, params, tokens, top_k=top_k, block=5)
    for name, want in plain(weights, top_k, [12, 12, 5, 5]).items():
      np.testing.assert_allclose(getattr(got, name), want, atol=1e-6, err_msg=name)


def test_memory_is_one_block_of_queries():
  layers, heads, length, block = 6, 4, 2048, 64
  q = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
  states = (nn.QueryKey(q, q),) * layers
  compiled = similarity.block_sums.jitted.lower(states, 0, length=length, top_k=8, block=block).compile()
  one = 4 * layers * heads * block * length
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 8 * one
  assert 8 * one < 4 * layers * heads * length * length / 2


def test_drift_is_the_distance_to_the_last_map():
  make = lambda value: similarity.Similarity(*[np.full((3, 3, 2), value)] * 4, *[np.zeros((3, 2))] * 2)
  np.testing.assert_allclose(similarity.drift([make(0.5), make(0.9), make(0.8)]), [0.3, 0.1, 0.0])
  with pytest.raises(ValueError, match="the same depth"):
    similarity.drift([])


def test_short_rows_are_refused(reference):
  model, params = sa_jax.from_pretrained(reference, layout="layers")
  with pytest.raises(ValueError, match="1 to 4"):
    similarity.layer_similarity(model, params, np.zeros((1, 4), np.int32), top_k=8)


def test_a_head_that_sees_the_first_key_only_is_like_no_other_without_it():
  shape = (1, 8, 1, 4)  # one head
  ordinary = nn.QueryKey(*(jax.random.normal(jax.random.key(n), shape) for n in range(2)))
  keys = jnp.full(shape, -100.0).at[:, 0].set(100.0)  # scores apart by more than float32's exponents reach
  sums = similarity.block_sums((nn.QueryKey(jnp.ones(shape), keys), ordinary), 0, length=8, top_k=2, block=8)
  cosine = similarity._finish(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)).cosine_without_sink[..., 0]
  np.testing.assert_allclose(cosine, [[0, 0], [0, 1]], atol=1e-6)
