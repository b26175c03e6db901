"""Quantised caches: what they round, what they weigh, and that decoding goes on as if nothing were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import sa_jax
from sa_jax import ops
from sa_jax.decode import Batcher, Engine, PromptCache, Prompts, Sampler, Serving
from sa_jax.decode.reading import _stored, begin, read
from sa_jax.nn import Cache
from sa_jax.ops.attention import decode, flash_decode
from tests import tiny

BOTH = pytest.mark.parametrize("form", ops.FORMATS.values(), ids=ops.FORMATS)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
  """The nearest vectors of so many bits, by NumPy; int4's scale is in bfloat16."""
  largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
  scale = (largest / -(2 ** (bits - 1))).astype(np.float32)
  if bits == 4:
    scale = scale.astype(jnp.bfloat16).astype(np.float32)
  return np.clip(np.rint(x / np.where(scale == 0, 1, scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def vectors(stored: ops.Quantised) -> np.ndarray:
  """What it stands for, number by number."""
  data = np.asarray(stored.data)
  if stored.format.bits == 4:
    unsigned = data.view(np.uint8).astype(np.int32)
    signed = lambda four: np.where(four < 8, four, four - 16) * 16
    data = np.concatenate([signed(unsigned & 15), signed(unsigned >> 4)], axis=-1)
  return data.astype(np.float32) * np.asarray(stored.scale, np.float32)


@BOTH
def test_rounding_by_numpy(form):
  x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
  x[1, 2] = 0.0
  stored = form.store(jnp.asarray(x))
  back = vectors(stored)
  np.testing.assert_allclose(back, rounded(x, form.bits), atol=1e-6)
  np.testing.assert_array_equal(np.asarray(stored.numbers()) * np.asarray(stored.scale, np.float32), back)
  assert stored.data.dtype == jnp.int8
  assert (stored.width, stored.data.shape[-1]) == (8, form.bits)
  step = form.step * np.abs(np.asarray(stored.scale, np.float32))
  assert np.all(np.abs(back - x) <= step / 2 * (1 + 1e-5) + step / 2 * (np.abs(x) > (128 / form.step - 1) * step))
  assert np.array_equal(back[1, 2], np.zeros(8))
  # The largest of each vector is kept, as exactly as its scale is.
  np.testing.assert_allclose(np.abs(back).max(-1), np.abs(x).max(-1), rtol=1e-6 if form.bits == 8 else 2**-8)
  assert form.nbytes(8) * 15 == stored.data.nbytes + stored.scale.nbytes


@pytest.mark.parametrize("width", [2, 24, 64])
def test_rotation_spreads_and_changes_no_product(width):
  q, k = np.random.default_rng(1).standard_normal((2, 5, width)).astype(np.float32)
  found = [ops.hadamard(jnp.asarray(each)) for each in (q, k)]
  np.testing.assert_allclose(found[0] @ found[1].T, q @ k.T, atol=1e-5)
  if width == 64:
    np.testing.assert_allclose(found[0], q @ scipy.linalg.hadamard(64) / 8, atol=1e-5)


@BOTH
def test_weights_and_sums_are_those_of_the_vectors_it_stands_for(form):
  """Scales are multiplied into products, whichever head shares which key."""
  rng = np.random.default_rng(2)
  q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 6, 8), *[(2, 2, 5, 8)] * 2))
  keys, values = form.store(jnp.asarray(keys)), form.store(jnp.asarray(values))
  rows = ops.Rows(offset=jnp.asarray([0, 2]))
  weights = ops.decode_weights(q, keys, rows)
  np.testing.assert_allclose(weights, ops.decode_weights(q, jnp.asarray(vectors(keys)), rows), atol=1e-6)
  expected = np.einsum("bnts,bnsh->btnh", weights, np.repeat(vectors(values), 3, axis=1))
  np.testing.assert_allclose(ops.decode_apply(weights, values), expected, atol=1e-6)


@BOTH
@pytest.mark.parametrize("kernel", [False, True])
def test_float16_weighs_many_small_values(kernel, form):
  """A weight of a long row times a scale is less than the least float16; the mean of the values is not."""
  slots = 4096
  values = np.random.default_rng(3).uniform(0.005, 0.01, (1, 1, slots, 64))
  stored, new = form.store(jnp.asarray(values, jnp.float32)), jnp.asarray(values[:, :, -1], jnp.float16)
  weights, last = jnp.full((1, 2, slots), 1 / slots, jnp.float16), jnp.asarray([slots - 1])
  if kernel:
    out, _ = flash_decode.follow(weights, new, stored, last, interpret=True)
  else:
    out = ops.decode_apply(weights[:, :, None], stored)[:, 0]
  assert out.dtype == jnp.float16
  np.testing.assert_allclose(out, np.repeat(vectors(stored).mean(axis=2), 2, axis=1), rtol=4e-3)


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1,2:3", num_layers=4)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(model, request):
  return sa_jax.Transformer(dataclasses.replace(model.config, cache_dtype=request.param), model.plan)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


def test_bytes_are_as_counted(quantised):
  cache = Cache.empty(quantised.config, quantised.plan, 3, 32)
  assert cache.nbytes == sa_jax.cost(quantised.config, quantised.plan, 3, 32).kv_cache_bytes
  assert cache.capacity == 32
  assert cache.layers[1].keys is None


@pytest.mark.parametrize(("cache_dtype", "part"), [("int8", (128 + 4) / 256), ("int4", (64 + 2) / 256)])
def test_part_of_bfloat16(cache_dtype, part):
  config = sa_jax.ModelConfig.preset("llama-3-8b")
  left = sa_jax.cost(dataclasses.replace(config, cache_dtype=cache_dtype), None).kv_bytes_per_token
  assert left / sa_jax.cost(config, None).kv_bytes_per_token == part


def test_logits_are_near_those_of_the_whole_cache(model, quantised, params):
  tokens = np.random.default_rng(1).integers(0, 61, (2, 24), np.int32)
  starts, lengths = np.zeros(2, np.int32), np.full(2, 24, np.int32)

  def logits(model):
    cache = Cache.empty(model.config, model.plan, 2, 24)
    hidden, cache = model.apply(
      {"params": params}, tokens, cache, ops.Rows(lengths, offset=starts), method=model.extend
    )
    return model.apply({"params": params}, hidden, method=model.logits), cache

  whole, _ = jax.jit(logits, static_argnums=0)(model)
  rounded, cache = jax.jit(logits, static_argnums=0)(quantised)
  assert isinstance(cache.layers[0].keys, ops.Quantised)
  error = np.abs(rounded - whole).max() / np.abs(whole).max()
  assert 1e-5 < error < (5e-2 if quantised.config.cache_dtype == "int8" else 0.5)


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_logits_are_those_of_keys_and_values_rounded_by_numpy(monkeypatch, cache_dtype):
  """With followers, narrow values, which tell keys from values, a window, sinks, and a chunk after the first."""
  bits = ops.FORMATS[cache_dtype].bits
  model = tiny.model("0:1,2:3", num_layers=4, value_dim=4, window=3, local_layers=(0, 1), sinks=True)
  params, tokens = tiny.params(model), tiny.tokens(1, 8)

  def logits(model):
    cache = Cache.empty(model.config, model.plan, 1, 8)
    hidden = []
    for start, end in ((0, 5), (5, 8)):
      rows = ops.Rows(np.asarray([end]), offset=np.asarray([start]))
      out, cache = model.apply({"params": params}, tokens[:, start:end], cache, rows, method=model.extend)
      hidden.append(out)
    return model.apply({"params": params}, jnp.concatenate(hidden, axis=1), method=model.logits)

  found = logits(sa_jax.Transformer(dataclasses.replace(model.config, cache_dtype=cache_dtype), model.plan))
  rotation = scipy.linalg.hadamard(8) / 8**0.5
  whole = logits(model)

  def write_rounded(cache, new, slots):
    x = np.asarray(new, np.float64)
    if bits == 4 and x.shape[-1] == 8:
      x = rounded(x @ rotation, bits) @ rotation.T
    else:
      x = rounded(x, bits)
    return write_slot(cache, jnp.asarray(x, jnp.float32), slots)

  write_slot = decode.write_slot
  monkeypatch.setattr(decode, "write_slot", write_rounded)
  np.testing.assert_allclose(found, logits(model), atol=1e-5)
  assert np.abs(found - whole).max() > 1e-4


def test_a_request_gets_the_same_alone_and_in_a_batch(quantised, params):
  prompts = [[5, 9, 3, 7], [11, 2], [40, 41, 42]]
  batcher = Batcher(quantised, params, Serving(slots=2, capacity=64))
  requests = [batcher.submit(prompt, 6) for prompt in prompts]
  batcher.run()
  for prompt, request in zip(prompts, requests, strict=True):
    assert request.tokens == sa_jax.generate(quantised, params, [prompt], max_new_tokens=6).tokens[0].tolist()


def test_chunks_after_a_beginning_are_what_it_is_read_with_at_once():
  """A beginning's tokens are rounded to those after it, and so are the tokens of a chunk to those of the next one."""
  model = tiny.model("0:1", num_layers=2, head_dim=16, cache_dtype="int4")
  params = tiny.params(model)
  prompts = Prompts.of([tiny.tokens(1, 60)[0]], 64, [1], 0, range(1))
  prefixes = PromptCache.read(model, params, prompts.tokens[0, :20]).match(prompts, model)
  engine = Engine(model)
  reading = begin(engine, prompts, prefixes)
  for start in (20, 40):
    reading = read(engine, params, reading, start, chunk=20)
  whole = engine.prefill(params, prompts, sampler=Sampler(), capacity=64, prefixes=prefixes).cache
  chunks = _stored(model.config, reading.cache)
  cut = lambda cache: jax.tree.map(lambda leaf: leaf[:, :, :60], cache)
  tiny.assert_trees_equal(cut(chunks), cut(whole))


def test_other_types_are_refused():
  with pytest.raises(ValueError, match="cache_dtype='int2' \\(must be one of int8, int4, None\\)"):
    sa_jax.ModelConfig.preset("smollm2-135m", cache_dtype="int2")
  with pytest.raises(ValueError, match=r"value_dim=33 \(must be a multiple of 2 for a cache in int4\)"):
    sa_jax.ModelConfig.preset("smollm2-135m", cache_dtype="int4", value_dim=33)


@pytest.mark.real_model
def test_loss_of_a_real_models_layers(shallow, smollm2, data):
  """Everything that is attended to has been rounded; `experiments/efficiency/quantised.py` does it with all layers."""
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
