"""The int8 cache: what it rounds, what it weighs, and that decoding goes on as if nothing were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.decode import Batcher
from sa_jax.nn import Cache
from sa_jax.ops.attention import flash_decode
from tests import tiny


def vectors(stored: ops.Int8) -> np.ndarray:
  """What it stands for."""
  return np.asarray(stored.data, np.float32) * np.asarray(stored.scale)


def test_rounding_by_numpy():
  x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
  x[1, 2] = 0.0
  stored = ops.Int8.of(jnp.asarray(x))
  scale = np.abs(x).max(axis=-1, keepdims=True) / 127
  np.testing.assert_allclose(stored.scale, scale, rtol=1e-6)
  assert stored.data.dtype == jnp.int8
  back = vectors(stored)
  assert np.all(np.abs(back - x) <= scale / 2 * (1 + 1e-5))
  assert np.array_equal(back[1, 2], np.zeros(8))
  # The largest of each vector is kept exactly.
  np.testing.assert_allclose(np.abs(back).max(axis=-1), np.abs(x).max(axis=-1), rtol=1e-6)


def test_weights_and_sums_are_those_of_the_vectors_it_stands_for():
  """Scales are multiplied into products, whichever head shares which key."""
  rng = np.random.default_rng(2)
  q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 6, 8), *[(2, 2, 5, 8)] * 2))
  keys, values = ops.Int8.of(jnp.asarray(keys)), ops.Int8.of(jnp.asarray(values))
  rows = ops.Rows(offset=jnp.asarray([0, 2]))
  weights = ops.decode_weights(q, keys, rows)
  np.testing.assert_allclose(weights, ops.decode_weights(q, jnp.asarray(vectors(keys)), rows), atol=1e-6)
  expected = np.einsum("bnts,bnsh->btnh", weights, np.repeat(vectors(values), 3, axis=1))
  np.testing.assert_allclose(ops.decode_apply(weights, values), expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [False, True])
def test_float16_weighs_many_small_values(kernel):
  """A weight of a long row times a scale is less than the least float16; the mean of the values is not."""
  slots = 4096
  values = np.random.default_rng(3).uniform(0.005, 0.01, (1, 1, slots, 64))
  stored, new = ops.Int8.of(jnp.asarray(values, jnp.float32)), jnp.asarray(values[:, :, -1], jnp.float16)
  weights, last = jnp.full((1, 2, slots), 1 / slots, jnp.float16), jnp.asarray([slots - 1])
  if kernel:
    out, _ = flash_decode.follow(weights, new, stored, last, interpret=True)
  else:
    out = ops.decode_apply(weights[:, :, None], stored)[:, 0]
  assert out.dtype == jnp.float16
  np.testing.assert_allclose(out, np.repeat(values.mean(axis=2), 2, axis=1), rtol=4e-3)


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1,2:3", num_layers=4)


@pytest.fixture(scope="module")
def int8(model):
  return sa_jax.Transformer(dataclasses.replace(model.config, cache_dtype="int8"), model.plan)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


def test_bytes_are_as_counted(int8):
  cache = Cache.empty(int8.config, int8.plan, 3, 32)
  assert cache.nbytes == sa_jax.cost(int8.config, int8.plan, 3, 32).kv_cache_bytes
  assert cache.capacity == 32
  assert cache.layers[1].keys is None
  config = sa_jax.ModelConfig.preset("llama-3-8b")
  half = sa_jax.cost(dataclasses.replace(config, cache_dtype="int8"), None).kv_bytes_per_token
  assert half / sa_jax.cost(config, None).kv_bytes_per_token == (128 + 4) / 256


def test_logits_are_near_those_of_the_whole_cache(model, int8, params):
  tokens = np.random.default_rng(1).integers(0, 61, (2, 24), np.int32)
  starts, lengths = np.zeros(2, np.int32), np.full(2, 24, np.int32)

  def logits(model):
    cache = Cache.empty(model.config, model.plan, 2, 24)
    hidden, cache = model.apply(
      {"params": params}, tokens, cache, ops.Rows(lengths, offset=starts), method=model.extend
    )
    return model.apply({"params": params}, hidden, method=model.logits), cache

  whole, _ = jax.jit(logits, static_argnums=0)(model)
  rounded, cache = jax.jit(logits, static_argnums=0)(int8)
  assert isinstance(cache.layers[0].keys, ops.Int8)
  error = np.abs(rounded - whole).max() / np.abs(whole).max()
  assert 1e-5 < error < 5e-2


def test_a_request_gets_the_same_alone_and_in_a_batch(int8, params):
  prompts = [[5, 9, 3, 7], [11, 2], [40, 41, 42]]
  batcher = Batcher(int8, params, slots=2, capacity=64)
  requests = [batcher.submit(prompt, 6) for prompt in prompts]
  batcher.run()
  for prompt, request in zip(prompts, requests, strict=True):
    assert request.tokens == sa_jax.generate(int8, params, [prompt], max_new_tokens=6).tokens[0].tolist()


def test_other_types_are_refused():
  with pytest.raises(ValueError, match="cache_dtype='int4' \\(int8 or None is needed\\)"):
    sa_jax.ModelConfig.preset("smollm2-135m", cache_dtype="int4")


@pytest.mark.real_model
def test_loss_of_a_real_models_layers(shallow, smollm2, data):
  """Everything that is attended to has been rounded; `experiments/efficiency/int8.py` does it with all layers."""
  model, params = shallow
  text = (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
  tokens = sa_jax.rows_of(sa_jax.load_tokenizer(smollm2).encode(text[:2000]), 256, 1)

  def loss(params, tokens, model):
    cache = Cache.empty(model.config, model.plan, *tokens.shape)
    starts, lengths = (jnp.full(len(tokens), filled, jnp.int32) for filled in (0, tokens.shape[1]))
    hidden, _ = model.apply({"params": params}, tokens, cache, ops.Rows(lengths, offset=starts), method=model.extend)
    head = lambda hidden: model.apply({"params": params}, hidden, method=model.logits)
    total, weight = ops.next_token_loss(head, hidden, tokens, chunk=64)
    return total / weight

  int8 = sa_jax.Transformer(dataclasses.replace(model.config, cache_dtype="int8"), model.plan)
  whole, rounded = (float(jax.jit(loss, static_argnums=2)(params, tokens, each)) for each in (model, int8))
  stacked = sa_jax.stack(params, model.plan)
  assert whole == pytest.approx(sa_jax.perplexity(model, stacked, tokens, batch_size=1).loss, abs=1e-4)
  assert rounded != whole
  assert rounded == pytest.approx(whole, abs=0.01)
