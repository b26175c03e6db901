"""Splash attention against the reference backend, its kernels in Pallas's interpreter."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sa_jax import ModelConfig, SharingPlan, Transformer, ops
from sa_jax.ops.attention import reference, splash
from sa_jax.ops.attention.dispatch import Backend
from sa_jax.sharding import on_mesh, param_shardings


@pytest.fixture(autouse=True)
def relaxed():
  """The kernels promote types and ranks inside."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def interpreted(monkeypatch):
  """The splash backend, able to run here."""
  attend = functools.partial(splash.attend, interpret=True)
  monkeypatch.setitem(ops.backends, "splash", Backend(attend, lambda *_: None, partitions=False))


def arrays(length, heads, kv_heads, head_dim, batch=2):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


# One block; a padded one; several blocks, the last partly padding; each with another grouping of heads.
@pytest.mark.parametrize(("length", "heads", "kv_heads", "head_dim"), [(128, 2, 2, 32), (200, 4, 2, 64), (1100, 2, 1, 8)])
def test_splash_is_the_reference_forward_and_backward(length, heads, kv_heads, head_dim):
  q, k, v, d_out = arrays(length, heads, kv_heads, head_dim)
  lengths = jnp.array([length, length // 2], jnp.int32)
  row = (jnp.arange(length)[None] < lengths[:, None])[..., None, None]
  d_out = jnp.where(row, d_out, 0)

  def both(attend):
    def run(q, k, v, lengths, d_out):
      out, pull = jax.vjp(lambda *qkv: attend(*qkv, lengths), q, k, v)
      return jnp.where(row, out, 0), pull(d_out)

    return jax.jit(run)(q, k, v, lengths, d_out)

  got, want = both(functools.partial(splash.attend, interpret=True)), both(reference.attend)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("length", [1, 128, 129, 640, 1024, 1025, 4096, 5000, 32768])
def test_blocks_tile_the_padded_length(length):
  padded = splash.padded_length(length)
  sizes = splash.block_sizes(padded)
  assert length <= padded < length + 512
  for block in (sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_q_dq, sizes.block_kv_dq):
    assert padded % block == 0
    assert block <= 1024
  assert sizes.block_kv % sizes.block_kv_compute == 0
  assert sizes.block_kv_compute % 128 == 0


def test_auto_is_splash_on_tpu_and_its_name_is_refused_elsewhere():
  q, k, v, _ = arrays(128, 2, 1, 8)
  assert ops.choose_backend("auto", q, k, platform="tpu") == "splash"
  with pytest.raises(ValueError, match="runs on TPUs, and this is cpu; 'auto'"):
    ops.attend(q, k, v, backend="splash")


TINY = ModelConfig(
  vocab_size=64, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, remat="full"
)


def loss_and_gradient(config, params, tokens, lengths):
  model = Transformer(config, SharingPlan.parse("0:1", 3))

  def loss(params, tokens, lengths):
    hidden = model.apply({"params": params}, tokens, lengths, method="hidden")
    head = lambda hidden: model.apply({"params": params}, hidden, method="logits")
    seen = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
    total, count = ops.next_token_loss(head, hidden, tokens, seen, chunk=48)
    return total / count

  return jax.jit(jax.value_and_grad(loss))(params, tokens, lengths)


def test_a_sharded_model_runs_splash_on_each_shard(interpreted):
  model = Transformer(TINY, SharingPlan.parse("0:1", 3))
  tokens = jax.random.randint(jax.random.key(1), (4, 130), 0, 64)
  lengths = jnp.array([130, 70, 1, 100], jnp.int32)
  params = jax.tree.map(jnp.asarray, jax.jit(lambda key: model.init(key, tokens))(jax.random.key(0))["params"])
  params = nn.unbox(params)
  want = loss_and_gradient(dataclasses.replace(TINY, attention="reference"), params, tokens, lengths)
  mesh = Mesh(
    np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  sharded = jax.device_put(params, param_shardings(model, mesh))
  with on_mesh(mesh):
    got = loss_and_gradient(dataclasses.replace(TINY, attention="splash"), sharded, tokens, lengths)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)


def test_on_a_mesh_without_rules_splash_says_what_is_missing(interpreted):
  model = Transformer(dataclasses.replace(TINY, attention="splash"), SharingPlan.dense(3))
  with jax.set_mesh(jax.make_mesh((8,), ("data",))), pytest.raises(ValueError, match="on_mesh"):
    jax.eval_shape(lambda key: model.init(key, jnp.zeros((8, 4), jnp.int32)), jax.random.key(0))
