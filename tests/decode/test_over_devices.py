"""The token loop over virtual devices: the same tokens and the same cache, which stays where it was put."""

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.decode import Batcher, Engine, Prompts, Sampler, Serving, insert
from sa_jax.decode.reading import begin
from sa_jax.nn import Cache
from sa_jax.sharding import make_mesh, on_mesh, param_shardings
from tests import tiny


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [(None, 1e-5), ("int8", 1e-2), ("int4", 0.2)])
def test_decoding_over_heads(cache_dtype, tolerance):
  model = tiny.model("1:2", num_layers=3, vocab_size=64, cache_dtype=cache_dtype)
  params = jax.tree.map(jax.numpy.asarray, tiny.params(model))
  prompts = Prompts.of(
    [tiny.tokens(3, 8)[row, :length] for row, length in enumerate((8, 5, 2))], 8, [10] * 3, 0, range(3)
  )
  read = Engine(model).prefill(params, prompts, sampler=Sampler(), capacity=16)
  slots = np.arange(3)

  def run(params, mesh=None):
    engine = Engine(model, mesh)
    state = insert(engine.empty(3, 16), read, slots)
    state, (tokens, _) = engine.decode(params, state, sampler=Sampler(), steps=6, width=6)
    return state.cache, tokens

  expected_cache, expected = run(params)
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  split = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  cache, tokens = run(split, mesh)
  np.testing.assert_array_equal(tokens, expected)
  assert (np.asarray(tokens) >= 0).all()
  quantised = lambda x: isinstance(x, ops.Quantised)
  vectors = lambda x: x.numbers().astype("float32") * x.scale.astype("float32") if quantised(x) else x
  read = lambda cache: jax.tree.map(vectors, cache.layers, is_leaf=quantised)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), read(cache), read(expected_cache))
  for leaf in jax.tree.leaves(cache):
    assert leaf.addressable_shards[0].data.shape[1] == 1


def test_one_row_over_many_devices(capfd):
  """Rows that do not divide are not split: whole prompts, and tokens one by one. XLA has nothing to say of it."""
  model = tiny.model("1:2", num_layers=3, vocab_size=64)
  params = jax.tree.map(jax.numpy.asarray, tiny.params(model))
  tokens = tiny.tokens(1, 6)
  expected = sa_jax.generate(model, params, tokens, max_new_tokens=4).tokens
  mesh = make_mesh(slice=2, fsdp=2, tensor=2)
  split = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  cache = Cache.empty(model.config, model.plan, 1, 64)
  with on_mesh(mesh):
    np.testing.assert_array_equal(sa_jax.generate(model, split, tokens, max_new_tokens=4).tokens, expected)
    start, end = np.asarray([0]), np.asarray([6])
    extend = jax.jit(
      lambda params: model.apply({"params": params}, tokens, cache, ops.Rows(end, offset=start), method=model.extend)
    )
    hidden, _ = extend(split)
  np.testing.assert_allclose(hidden, model.apply({"params": params}, tokens, method=model.hidden), atol=2e-5)
  assert "full rematerialization" not in capfd.readouterr().err


def test_fewer_rows_than_devices():
  model = tiny.model("0:1", num_layers=2, vocab_size=64)
  params = tiny.params(model)
  mesh = make_mesh(fsdp=8)
  split = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  tokens = tiny.tokens(2, 3, 64)
  found, wanted = (sa_jax.generate(model, each, tokens, max_new_tokens=4).tokens for each in (split, params))
  np.testing.assert_array_equal(found, wanted)


def test_a_prompt_on_a_mesh_begins_without_compiling_again(monkeypatch):
  model = tiny.model("0:1", num_layers=2, vocab_size=64)
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  engine, traced, empty = Engine(model, mesh), [], Cache.empty
  monkeypatch.setattr(Cache, "empty", lambda *given: traced.append(given) or empty(*given))
  calls = []
  for seed in range(3):
    begin(engine, Prompts.of(list(tiny.tokens(1, 40, seed=seed)), 64, [1], 0, range(1)))
    calls.append(len(traced))
  assert calls == calls[:1] * 3


def test_chunks_of_a_prompt_over_heads_and_no_pages():
  model = tiny.model("1:2", num_layers=3, vocab_size=64)
  params, prompts = tiny.params(model), [row[:length] for row, length in zip(tiny.tokens(2, 40), (3, 40))]
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  split = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  with pytest.raises(sa_jax.UserError, match="a paged cache cannot be sharded: leave out cache_slots on a mesh"):
    Batcher(model, split, Serving(slots=2, capacity=64, cache_slots=128))
  batcher = Batcher(model, split, Serving(slots=2, capacity=64, chunk=1, read=16))
  short = batcher.submit(prompts[0], 6)
  batcher.step()
  long = batcher.submit(prompts[1], 3)
  batcher.step()
  assert long.status == "waiting"
  batcher.run()
  for request, prompt in zip((short, long), prompts, strict=True):
    alone = sa_jax.generate(model, params, prompt[None], None, request.max_new_tokens)
    assert request.tokens == alone.tokens[0].tolist()
