"""Splash attention against the reference backend, its kernels in Pallas's interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.nn import QueryKey
from sa_jax.ops.attention import reference, splash
from sa_jax.ops.attention.dispatch import Backend
from sa_jax.ops.attention.rows import SEGMENTS
from sa_jax.sharding import DEFAULT_RULES, make_mesh, on_mesh, param_shardings
from tests import tiny


@pytest.fixture(autouse=True)
def relaxed():
  """The kernels promote types and ranks inside."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def interpreted(monkeypatch):
  """The splash backend, able to run here."""
  attend = functools.partial(splash.attend, interpret=True)
  monkeypatch.setitem(ops.backends, "splash", Backend(attend, frozenset({SEGMENTS}), partitions=False))


def arrays(length, heads, kv_heads, head_dim, batch=2):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


# One block; a padded one; several blocks, the last partly padding; each with another grouping of heads and spec.
@pytest.mark.parametrize(
  ("length", "heads", "kv_heads", "head_dim", "spec"),
  [
    (128, 2, 2, 32, ops.AttentionSpec()),
    (200, 4, 2, 64, ops.AttentionSpec(softcap=2.0, scale=0.3)),
    (1100, 2, 1, 8, ops.AttentionSpec(window=700)),
  ],
)
def test_splash_is_the_reference_forward_and_backward(length, heads, kv_heads, head_dim, spec):
  q, k, v, d_out = arrays(length, heads, kv_heads, head_dim)
  lengths = jnp.array([length, length // 2], jnp.int32)
  row = (jnp.arange(length)[None] < lengths[:, None])[..., None, None]
  d_out = jnp.where(row, d_out, 0)

  def both(attend):
    def run(q, k, v, lengths, d_out):
      out, pull = jax.vjp(lambda *qkv: attend(*qkv, ops.Rows(lengths), spec), q, k, v)
      return jnp.where(row, out, 0), pull(d_out)

    return jax.jit(run)(q, k, v, lengths, d_out)

  got, want = both(functools.partial(splash.attend, interpret=True)), both(reference.attend)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("length", [1, 128, 129, 640, 1024, 1025, 4096, 5000, 32768])
def test_blocks_tile_the_padded_length(length):
  padded = splash.padded_length(length)
  sizes = splash.block_sizes(padded)
  assert length <= padded < length + 512
  assert sizes.has_backward_blocks
  blocks = {value for name, value in dataclasses.asdict(sizes).items() if name.startswith("block_")}
  assert all(padded % block == 0 and block % 128 == 0 and 128 <= block <= 1024 for block in blocks)
  assert sizes.block_kv % sizes.block_kv_compute == 0
  assert padded <= 1024 or sizes.block_q >= 512


def test_auto_is_splash_on_tpu_and_its_name_is_refused_elsewhere():
  q, k, v, _ = arrays(128, 2, 1, 8)
  assert ops.choose_backend("auto", q, k, platform="tpu") == "splash"
  with pytest.raises(ValueError, match="runs on TPUs, but this is cpu; use blockwise, reference, chunked"):
    ops.attend(q, k, v, backend="splash")


PLAN = "0:1"


def small(**changes):
  return tiny.model(PLAN, num_layers=2, vocab_size=64, **changes)


def loss_and_gradient(model, params, tokens, lengths):

  def loss(params, tokens, lengths):
    hidden = model.apply({"params": params}, tokens, ops.Rows(lengths), method=model.hidden)
    head = lambda hidden: model.apply({"params": params}, hidden, method=model.logits)
    seen = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
    total, count = ops.next_token_loss(head, hidden, tokens, seen, chunk=48)
    return total / count

  return jax.jit(jax.value_and_grad(loss))(params, tokens, lengths)


@pytest.mark.parametrize("third", ["tensor", "sequence"])
def test_a_sharded_model_runs_splash_on_each_shard(interpreted, third):
  """On whole rows: of tokens that are split over devices, in exchange for heads."""
  params = tiny.params(small(), layout="runs")
  tokens = jnp.asarray(tiny.tokens(4, 100))
  lengths = jnp.array([100, 70, 2, 31], jnp.int32)
  want = loss_and_gradient(small(attention="reference"), params, tokens, lengths)
  auto = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", third), axis_types=auto)
  model = small(attention="splash")
  sharded = jax.device_put(params, param_shardings(model, mesh))
  with on_mesh(mesh):
    got = loss_and_gradient(model, sharded, tokens, lengths)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)


def rules_with(kv_heads):
  return (("kv_heads", kv_heads), *(rule for rule in DEFAULT_RULES if rule[0] != "kv_heads"))


def test_each_device_takes_the_keys_of_its_queries(interpreted):
  """Where all have all keys, it does not pair its query heads with the first of them."""
  q, k, v, _ = arrays(128, 8, 2, 8)
  with on_mesh(make_mesh(data=2, tensor=4), rules_with(None)):
    found = jax.jit(QueryKey(q, k, backend="splash").attend)(v)
  np.testing.assert_allclose(found, QueryKey(q, k, backend="reference").attend(v), rtol=1e-5, atol=2e-5)


def test_heads_apart_from_their_keys_are_refused(interpreted):
  q, k, v, _ = arrays(128, 8, 2, 8)
  rules = (("batch", None), *rules_with("data"))
  with (
    on_mesh(make_mesh(data=2, tensor=4), rules),
    pytest.raises(ValueError, match="'heads' and 'kv_heads' .* or only 'heads'"),
  ):
    jax.eval_shape(QueryKey(q, k, backend="splash").attend, v)


def test_on_a_mesh_without_rules_splash_says_what_is_missing(interpreted):
  model = small(attention="splash")
  with jax.set_mesh(jax.make_mesh((8,), ("data",))), pytest.raises(ValueError, match="on_mesh"):
    jax.eval_shape(lambda key: model.init(key, jnp.zeros((8, 4), jnp.int32)), jax.random.key(0))
