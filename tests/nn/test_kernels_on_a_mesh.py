"""Decoding over virtual devices: kernels run of each device's part of heads and MLP, interpreted, or do not run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sa_jax import ops
from sa_jax.hlo import collectives
from sa_jax.ops import kernels
from sa_jax.ops.attention import decode, flash_decode
from sa_jax.sharding import cache_shardings, make_mesh, on_mesh, param_shardings
from tests import tiny


@pytest.fixture
def on_gpus(monkeypatch):
  """As if these were GPUs, any dtype and head being good for the kernels; yields what they are called with."""
  monkeypatch.setattr(kernels, "platform", lambda: "gpu")
  monkeypatch.setattr(ops, "has_linear_kernels", lambda x, *weights: all(map(kernels.has_gpu_kernels, weights)))
  which = lambda tokens, dtype, *cached: "flash_decode" if all(map(kernels.has_gpu_kernels, cached)) else None
  monkeypatch.setattr(decode, "which_kernels", which)
  called = []

  def interpreted(module, name):
    kernel = getattr(module, name)

    def call(*arrays, **options):
      called.append((name, tuple(leaf.shape for leaf in jax.tree.leaves(arrays) if hasattr(leaf, "shape"))))
      return kernel(*arrays, **options, interpret=True)

    monkeypatch.setattr(module, name, call)

  interpreted(ops, "gated_linear")
  interpreted(ops, "linears")
  interpreted(flash_decode, "attend")
  interpreted(flash_decode, "follow")
  return called


def test_kernels_take_whole_arrays_or_a_devices_own_part(monkeypatch):
  monkeypatch.setattr(kernels, "platform", lambda: "gpu")
  has, asked = kernels.has_gpu_kernels, []
  ask = lambda x: asked.append(has(x)) or x
  x, mesh = jnp.zeros((8, 4)), make_mesh(tensor=8)
  spread = jax.device_put(x, jax.NamedSharding(mesh, P("tensor")))
  jax.jit(ask)(x)
  jax.jit(lambda x: ask(x + 1))(spread)
  with on_mesh(mesh):
    jax.jit(ask)(x)
    jax.jit(jax.shard_map(ask, in_specs=P("tensor"), out_specs=P("tensor")))(x)
  with on_mesh(make_mesh(devices=jax.devices()[:1])):
    jax.jit(ask)(x)
  assert asked == [True, False, False, True, True]
  assert not has(spread)
  monkeypatch.undo()
  assert not has(x)


def parts():
  """An anchor alone and one with a follower: the model, and a step's parameters, cache, and tokens and positions."""
  shapes = dict(embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=128, vocab_size=64)
  model = tiny.model("1:2", num_layers=3, max_length=64, **shapes)
  params = jax.tree.map(jnp.asarray, tiny.params(model))
  tokens, positions = tiny.tokens(4, 10), jnp.asarray([10, 7, 3, 9])
  _, cache = jax.jit(lambda *given: model.apply({"params": params}, *given, method="prefill"))(tokens, positions)
  cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 54), (0, 0))), cache)
  return model, params, cache, (jnp.asarray(tokens[:, 0]), positions)


def step(model, rows):
  tokens, positions = rows
  return jax.jit(lambda params, cache: model.apply({"params": params}, tokens, cache, positions, method="step"))


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=["tensor", "fsdp and tensor"])
def test_a_step_over_devices_is_the_step(request, sizes):
  model, params, cache, rows = parts()
  expected, expected_cache = step(model, rows)(params, cache)
  mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
  params = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  cache = jax.device_put(cache, cache_shardings(model, mesh))
  called = request.getfixturevalue("on_gpus")
  with on_mesh(mesh):
    compiled = step(model, rows).lower(params, cache).compile()
  batch = 4 // sizes.get("fsdp", 1)
  anchor, follower = ["linears", "attend", "gated_linear"], ["follow", "gated_linear"]
  assert [name for name, _ in called] == anchor + anchor + follower
  assert called[0][1] == ((batch, 64), (64, 128), (64, 64), (64, 64))
  assert called[1][1] == ((batch, 2, 64), *[(batch, 1, 64)] * 2, *[(batch, 1, 64, 64)] * 2, (batch,))
  assert called[2][1] == ((batch, 64), (64, 64), (64, 64))
  assert called[6][1] == ((batch, 2, 64), (batch, 1, 64), (batch, 1, 64, 64), (batch,))
  logits, new_cache = compiled(params, cache)
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new_cache, expected_cache)
  if "fsdp" not in sizes:
    # Weights and cache stay where they are: what is gathered is less than any matrix, and less than a layer's keys.
    gathered = {found.kind: found.bytes for found in collectives(compiled.as_text())}.get("all-gather", 0)
    assert gathered < 4 * 64 * 2 * 64


def test_without_rules_no_kernel_runs(request):
  model, params, cache, rows = parts()
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  params = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  cache = jax.device_put(cache, cache_shardings(model, mesh))
  called = request.getfixturevalue("on_gpus")
  step(model, rows).lower(params, cache)
  with jax.set_mesh(mesh):
    step(model, rows).lower(params, cache)
  assert called == []


def test_the_default_device_says_where_arrays_are(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert kernels.platform() == "gpu"
  for device in ("cpu", jax.devices()[1]):
    with jax.default_device(device):
      assert kernels.platform() == "cpu"
