"""Values narrower than keys: the numbers of the model whose values are filled up with zeros, in fewer bytes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.decode import Batcher, Serving
from sa_jax.nn import Transformer
from sa_jax.train.batch import Batch
from sa_jax.train.objective import next_token
from tests import tiny

WIDTH = 3
PLAN = sa_jax.SharingPlan.parse(tiny.PLAN, 7).with_head_maps({2: (2, 0, 3, 3)})


def models(width=WIDTH, **changes):
  """A model with values of fewer numbers where keys have 8, and the same with zeros behind them."""
  narrow = Transformer(tiny.config(value_dim=width, **changes), PLAN)
  return narrow, Transformer(dataclasses.replace(narrow.config, value_dim=None), PLAN)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "attention_state": "attention_weights"}])
def test_logits_decoding_and_gradients(changes):
  narrow, wide = models(**changes)
  params = tiny.params(narrow)
  tokens = tiny.tokens(2, 12)
  logits = jax.jit(narrow.apply)({"params": params}, tokens)
  np.testing.assert_allclose(logits, jax.jit(wide.apply)({"params": tiny.filled(params)}, tokens), atol=1e-5)

  stepped, cache = jax.jit(narrow.apply, static_argnames="method")(
    {"params": params}, tokens[:, :8], np.array([8, 5], np.int32), method=Transformer.prefill
  )
  np.testing.assert_allclose(stepped, logits[[0, 1], [7, 4]], atol=1e-5)
  assert {each.values.shape[3] for each in cache.layers} == {WIDTH}
  cache = cache.grow(16)
  empty = sa_jax.nn.Cache.empty(narrow.config, PLAN, 2, 16)
  assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty)
  step = jax.jit(functools.partial(narrow.apply, method=Transformer.step))
  for index in range(3):
    places = np.array([8, 5], np.int32) + index
    stepped, cache = step({"params": params}, tokens[[0, 1], places], cache, places)
    np.testing.assert_allclose(stepped, logits[[0, 1], places], atol=1e-5)

  batch = Batch(tokens, np.ones(tokens.shape, np.float32))
  loss = lambda model: lambda params: next_token(model)(params, None, batch, jnp.int32(0))[0]
  gradient = jax.jit(jax.grad(loss(narrow)))(params)
  of_wide = jax.jit(jax.grad(loss(wide)))(tiny.filled(params))
  cut = jax.tree.map(lambda leaf, like: leaf[tuple(map(slice, like.shape))], of_wide, gradient)
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5), gradient, cut)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "chunked", "filled"])
def test_backends(backend):
  """Those that take unequal widths, and one that does not."""
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(2, 300, heads, width)), jnp.float32) for heads, width in ((4, 8), (2, 8), (2, 3))
  )
  rows = ops.Rows(np.array([300, 77], np.int32))
  whole = np.pad(v, ((0, 0),) * 3 + ((0, 5),))
  if backend == "filled":
    seen = []
    made = ops.Backend(
      lambda *args: seen.append(args[2].shape) or ops.backends["reference"].attend(*args)
    ).taking_narrow()
    out = made.attend(q, k, v, rows, ops.AttentionSpec())
    assert seen == [(2, 300, 2, 8)]
  else:
    out = ops.attend(q, k, v, rows, backend=backend)
  wanted = ops.attend(q, k, whole, rows, backend="reference")[..., :3]
  np.testing.assert_allclose(out[0], wanted[0], atol=2e-6)
  np.testing.assert_allclose(out[1, :77], wanted[1, :77], atol=2e-6)
  with pytest.raises(ValueError, match="R at most H"):
    ops.attend(q, k, jnp.zeros((2, 300, 2, 9)), rows)


def test_files(tmp_path):
  """Saved, opened under its plan and another one, converted, and not taken for what it is not."""
  narrow, _ = models()
  params = tiny.params(narrow)
  sa_jax.save(tmp_path / "saved", narrow, params)
  values = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert values["shared_attention"]["value_dim"] == WIDTH
  model, loaded = sa_jax.load(tmp_path / "saved")
  assert (model.config, model.plan) == (narrow.config, narrow.plan)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  sa_jax.convert(tmp_path / "saved", tmp_path / "converted", "1:2-6", dtype=None)
  other, fewer = sa_jax.from_pretrained(tmp_path / "converted", layout="layers")
  assert other.config.value_dim == WIDTH
  assert fewer["layers"]["4"]["attention"].keys() == {"v_proj", "o_proj"}
  # Without the entry, the files are not what the config describes.
  del values["shared_attention"]["value_dim"]
  (tmp_path / "saved" / "config.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"wrong shape: layers/0/attention/v_proj/kernel is \[32, 2, 3\]"):
    sa_jax.from_pretrained(tmp_path / "saved")
  for value, fault in ((0, "a positive integer"), (9, "at most head_dim=8"), ("3", "a positive integer")):
    values["shared_attention"]["value_dim"] = value
    with pytest.raises(ValueError, match=fault):
      sa_jax.ModelConfig.from_hf(values)
  with pytest.raises(ValueError, match="values between queries and keys"):
    dataclasses.replace(narrow.config, family="internlm2").to_hf()


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
def test_generation_and_its_bytes(cache_dtype):
  """Batched, one by one, and by draft, from a cache of as many bytes as are counted."""
  narrow, wide = models(WIDTH + 1, cache_dtype=cache_dtype)  # an even number, for two in a byte
  params = tiny.params(narrow)
  tokens = tiny.tokens(3, 9)
  wanted = sa_jax.generate(wide, tiny.filled(params), tokens, max_new_tokens=8).tokens
  np.testing.assert_array_equal(sa_jax.generate(narrow, params, tokens, max_new_tokens=8).tokens, wanted)
  batcher = Batcher(narrow, params, Serving(slots=2, capacity=32))
  requests = [batcher.submit(row, 8) for row in tokens]
  batcher.run()
  np.testing.assert_array_equal([request.tokens for request in requests], wanted)
  cost = sa_jax.cost(narrow.config, PLAN, 2, 16)
  assert sa_jax.nn.Cache.empty(narrow.config, PLAN, 2, 16).nbytes == cost.kv_cache_bytes
  assert cost.params == sum(leaf.size for leaf in jax.tree.leaves(params))
