"""Against the answers of the PyTorch reference: every number it gives, in both attention states."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import SharingPlan, Transformer, ops
from sa_jax.decode import to_right_padded
from sa_jax.formats.table import entries
from tests import tiny

STATES = ("query_key", "attention_weights")


@functools.cache
def opened(folder: Path, state: str, shared: bool = True):
  """Model, parameters in the layer layout, the reference's answers."""
  followers = json.loads((folder / "sharing.json").read_text())["shared_layers"]
  depth = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
  plan = SharingPlan.from_followers(depth, followers) if shared else None
  model, params = sa_jax.from_pretrained(folder, plan, layout="layers")
  # The reference does not stop at an end token.
  config = dataclasses.replace(model.config, attention_state=state, eos_token_ids=())
  return Transformer(config, model.plan), params, tiny.arrays_of(folder / "expected.npz")


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, tokens, lengths=None, method=None):
  rows = (lengths,) if lengths is not None else ()
  return model.apply({"params": params}, tokens, *rows, method=method)


@pytest.mark.parametrize("state", STATES)
def test_logits(reference, state):
  model, params, expected = opened(reference, state)
  tokens = expected["input_ids"].astype(np.int32)
  np.testing.assert_allclose(apply(model, params, tokens), expected["logits_unpadded"], rtol=0, atol=1e-4)


def test_logits_without_sharing(reference):
  model, params, expected = opened(reference, "query_key", shared=False)
  tokens = expected["input_ids"].astype(np.int32)
  np.testing.assert_allclose(apply(model, params, tokens), expected["logits_baseline_no_sharing"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("state", STATES)
def test_attention_weights(reference, state):
  model, params, expected = opened(reference, state)
  states = apply(model, params, expected["input_ids"].astype(np.int32), method="states")
  weights = np.stack([np.asarray(layer.weights()) for layer in states])
  np.testing.assert_allclose(weights, expected["attentions_unpadded"], rtol=0, atol=1e-4)
  for layer, source in enumerate(model.plan.source):
    np.testing.assert_array_equal(weights[layer], weights[source])


@pytest.mark.parametrize("state", STATES)
def test_left_padded_logits(reference, state):
  model, params, expected = opened(reference, state)
  mask = expected["attention_mask"]
  assert (mask == 0).any()
  # The reference feeds the same tokens, padded on the left.
  padded = left_padded_tokens(expected)
  tokens, lengths = to_right_padded(padded, mask)
  logits = np.asarray(apply(model, params, tokens, lengths))
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      logits[row, :length], expected["logits_left_padded"][row, mask[row] == 1], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("state", STATES)
def test_greedy_tokens(reference, state):
  model, params, expected = opened(reference, state)
  new = expected["greedy_tokens"].shape[1]
  out = sa_jax.generate(
    model, params, left_padded_tokens(expected), attention_mask=expected["attention_mask"], max_new_tokens=new
  )
  np.testing.assert_array_equal(out.tokens, expected["greedy_tokens"])
  assert out.lengths.tolist() == [new] * len(out.tokens)


@pytest.mark.parametrize("state", STATES)
def test_logits_along_greedy_tokens(reference, state):
  """The reference decoded with its cache; here the same tokens are read at once, without one."""
  model, params, expected = opened(reference, state)
  tokens, lengths = to_right_padded(left_padded_tokens(expected), expected["attention_mask"])
  greedy = expected["greedy_tokens"].astype(np.int32)
  steps = greedy.shape[1]
  whole = np.concatenate([tokens, np.zeros_like(greedy)], axis=1)
  for row, length in enumerate(lengths):
    whole[row, length : length + steps] = greedy[row]
  logits = np.asarray(apply(model, params, whole, (lengths + steps).astype(np.int32)))
  for row, length in enumerate(lengths):
    along = logits[row, length - 1 : length - 1 + steps]
    np.testing.assert_allclose(along, expected["greedy_logits"][row], rtol=0, atol=1e-4)


def test_cache_holds_what_the_reference_caches(reference):
  model, _, expected = opened(reference, "query_key")
  cache = sa_jax.nn.Cache.empty(model.config, model.plan, batch=1, capacity=1)
  assert [len(jax.tree.leaves(layer)) for layer in cache.layers] == expected["cache_tensors_per_layer"].tolist()


@pytest.mark.parametrize("state", STATES)
def test_loss_and_gradients(reference, state):
  model, params, expected = opened(reference, state)
  tokens = jnp.asarray(expected["input_ids"], jnp.int32)

  @jax.jit
  def loss_and_norms(params):
    def loss(params):
      logits = model.apply({"params": params}, tokens)
      return -ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, gradients))

  loss, norms = loss_and_norms(params)
  assert abs(float(loss) - float(expected["loss"])) <= 1e-5
  wanted = {
    name.removeprefix("grad_norm/"): float(expected[name]) for name in expected if name.startswith("grad_norm/")
  }
  found = {}
  for entry in entries(model.config):
    node = norms
    for name in entry.path:
      node = node.get(name, {})
    if not isinstance(node, dict):
      found[entry.key] = float(node)
  assert found.keys() == wanted.keys()
  assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


def left_padded_tokens(expected) -> np.ndarray:
  """The padded batch: the mask says which slots are padding, whose token does not matter."""
  return np.where(expected["attention_mask"] == 1, expected["input_ids"], 0).astype(np.int32)
