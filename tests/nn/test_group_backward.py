"""Models whose groups have one backward pass: the gradients of models whose layers have their own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import SharingPlan, Transformer, nn, ops
from sa_jax.sharding import abstract_params, make_mesh, named_sharding, on_mesh, param_shardings
from sa_jax.train.config import TrainConfig, check_same, recorded
from sa_jax.train.learner import model_of
from tests import tiny

LENGTH = 300


def pair(plan: str, **changes) -> list[Transformer]:
  """With one backward pass a group, and without."""
  settings = {"num_layers": 6, "attention": "blockwise", "max_length": LENGTH} | changes
  return [tiny.model(plan, group_backward=once, **settings) for once in (True, False)]


def gradient(model: Transformer, params, tokens):
  loss = lambda params: jnp.square(model.apply({"params": params}, tokens)).mean()
  return jax.jit(jax.grad(loss))(params)


def same(found, expected) -> None:
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
  jax.tree.map(close, found, expected)


@pytest.fixture
def followed(monkeypatch) -> list[ops.Followers]:
  """What `sa_jax.ops.follow` is called with while a model is traced."""
  called, follow = [], ops.follow
  monkeypatch.setattr(ops, "follow", lambda *arguments: called.append(arguments[-1]) or follow(*arguments))
  return called


@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
@pytest.mark.parametrize("plan", ["0:1-3", "0:1-2,3:4-5"])
def test_gradients(plan, remat, followed):
  layers = 4 if plan == "0:1-3" else 6
  once, apart = pair(plan, remat=remat, num_layers=layers)
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(2, LENGTH)
  same(gradient(once, params, tokens), gradient(apart, params, tokens))
  assert {how.layers for how in followed} == {len(SharingPlan.parse(plan, layers).groups[0][1])}


def test_values_narrower_than_keys(followed):
  once, apart = pair("0:1-2", num_layers=3, value_dim=4)
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(1, LENGTH)
  same(gradient(once, params, tokens), gradient(apart, params, tokens))
  assert followed


def test_parts_that_take_no_narrow_values_get_none(monkeypatch, followed):
  blockwise = ops.backends["blockwise"]
  wide = blockwise._replace(parts=blockwise.parts._replace(narrow=False))
  monkeypatch.setitem(ops.backends, "blockwise", wide)
  for value_dim in (4, None):
    once, _ = pair("0:1-2", num_layers=3, value_dim=value_dim)
    abstract_params(once)
    assert bool(followed) == (value_dim is None)


class Twice(nn.QueryKey):
  """A state that attends otherwise."""

  def attend(self, v):
    return 2 * super().attend(v)


class TwiceAttention(nn.AnchorAttention):
  """Its followers get somebody's own state."""

  def new_state(self, q, k, rows, kind):
    return Twice(**vars(super().new_state(q, k, rows, kind)))


class PickedAttention(nn.AnchorAttention):
  """Its followers get a key head for each query head."""

  def new_state(self, q, k, rows, kind):
    return super().new_state(q, k, rows, kind).take_heads(jnp.arange(q.shape[2]))


class TwiceBlock(nn.AnchorBlock):
  """With `TwiceAttention`."""

  attention_type = TwiceAttention


class PickedBlock(nn.AnchorBlock):
  """With `PickedAttention`."""

  attention_type = PickedAttention


class OwnFollower(nn.FollowerBlock):
  """Somebody's own, which may use the state otherwise."""


@pytest.mark.parametrize(
  ("plan", "changes", "blocks"),
  [
    ("0:1,2:3", {"num_layers": 4}, nn.Blocks()),  # one follower each: its own backward pass has fewer products
    ("0:1-2", {"num_layers": 3, "attention": "reference"}, nn.Blocks()),
    ("0:1-2", {"num_layers": 3, "sinks": True}, nn.Blocks()),
    ("0:1-2", {"num_layers": 3, "attention_state": "attention_weights"}, nn.Blocks()),
    ("0:1-2", {"num_layers": 3}, nn.Blocks(follower=OwnFollower)),
    ("0:1-2", {"num_layers": 3}, nn.Blocks(anchor=TwiceBlock)),
    ("0:1-2", {"num_layers": 3}, nn.Blocks(anchor=PickedBlock)),
  ],
)
def test_where_each_layer_keeps_its_own(plan, changes, blocks, followed):
  once, apart = (model.clone(blocks=blocks) for model in pair(plan, **changes))
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(1, LENGTH)
  same(gradient(once, params, tokens), gradient(apart, params, tokens))
  assert not followed


def test_followers_with_head_maps_keep_their_own(followed):
  """Their heads' gradients belong to other heads of the anchor."""
  once, apart = (
    model.clone(plan=model.plan.with_head_maps({2: (3, 2, 1, 0)})) for model in pair("0:1-2", num_layers=3)
  )
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(1, LENGTH)
  same(gradient(once, params, tokens), gradient(apart, params, tokens))
  assert not followed


def test_nothing_is_computed_for_it_forward():
  """Taps are zeros that nobody reads."""
  tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

  def temporaries(model):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.params(model, "runs"))
    compiled = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

  once, apart = map(temporaries, pair("0:1-5"))
  assert once == apart


@pytest.mark.parametrize("partitions", [True, False])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_on_a_mesh(sizes, partitions, monkeypatch, followed):
  """Split by XLA, or as kernels are, of each device's part."""
  blockwise = ops.backends["blockwise"]
  monkeypatch.setitem(
    ops.backends, "blockwise", blockwise._replace(parts=blockwise.parts._replace(partitions=partitions))
  )
  once, apart = pair("0:1-2", num_layers=3)
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(8, LENGTH)
  expected = gradient(apart, params, tokens)
  mesh = make_mesh(**sizes)
  spread = jax.device_put(params, param_shardings(once, mesh))
  with on_mesh(mesh):
    found = gradient(once, spread, jax.device_put(tokens, named_sharding(mesh, ("batch", "length"))))
  same(jax.device_get(found), expected)
  assert followed


def test_rows_split_over_devices_keep_each_layers_own(followed):
  once, apart = pair("0:1-2", num_layers=3, num_kv_heads=1)
  params, tokens = jax.tree.map(jnp.asarray, tiny.params(apart, "runs")), tiny.tokens(1, 512)
  with on_mesh(mesh := make_mesh(sequence=8)):
    found = gradient(once, jax.device_put(params, param_shardings(once, mesh)), tokens)
  same(jax.device_get(found), gradient(apart, params, tokens))
  assert not followed


def test_a_run_of_before_is_the_same_run():
  config = TrainConfig(Path("run"), shape=tiny.config())
  check_same(config, recorded(config), config.out)
  assert "group_backward" not in str(recorded(config))


def test_training_has_it():
  no_tokenizer: Any = SimpleNamespace(special_id=lambda name: None)
  assert model_of(TrainConfig(Path("run"), preset="smollm2-135m"), no_tokenizer).config.group_backward
