"""The two layouts are one truth: stack and unstack are inverse on arrays and on shapes."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_jax import SharingPlan, prune, stack, unstack
from sa_jax.params import as_layers, as_runs
from tests.test_plan import plans
from tests.tiny import assert_trees_equal

NUMPY, JAX = np.asarray, jnp.asarray


def layers(plan: SharingPlan, kind=np.asarray):
  """Parameters of a few sizes, every value of which says what it is: layer, leaf, index."""

  def leaf(layer: int, number: int, *shape: int):
    return kind((100 * layer + 10 * number + np.arange(np.prod(shape))).reshape(shape).astype(np.float32))

  def block(layer: int):
    attention = {"v_proj": {"kernel": leaf(layer, 0, 2, 1, 2)}, "o_proj": {"kernel": leaf(layer, 1, 1, 2, 2)}}
    if plan.is_anchor(layer):
      attention |= {"q_proj": {"kernel": leaf(layer, 2, 2, 2)}, "k_proj": {"kernel": leaf(layer, 3, 2)}}
    return {"attention": attention, "mlp_norm": {"scale": leaf(layer, 4, 3)}}

  return {
    "embed": {"embedding": leaf(90, 0, 4, 2)},
    "layers": {str(layer): block(layer) for layer in range(plan.num_layers)},
    "final_norm": {"scale": leaf(91, 0, 2)},
  }


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_literal():
  plan = SharingPlan.parse("1:2-3,4:5-6", 8)
  stacked = stack(layers(plan), plan)
  assert set(stacked) == {"embed", "runs", "final_norm"}
  assert set(stacked["runs"]) == {"0", "1", "2"}
  assert set(stacked["runs"]["0"]) == {"anchor"}
  run = stacked["runs"]["1"]
  # The first element of a layer's norm is 100 × layer + 40.
  np.testing.assert_array_equal(run["anchor"]["mlp_norm"]["scale"][:, 0], [140, 440])
  np.testing.assert_array_equal(run["followers"]["mlp_norm"]["scale"][:, :, 0], [[240, 340], [540, 640]])
  assert set(run["followers"]["attention"]) == {"v_proj", "o_proj"}
  assert set(run["anchor"]["attention"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@given(plans(12))
def test_unstack_inverts_stack(plan):
  params = layers(plan)
  stacked = stack(params, plan)
  assert_trees_equal(unstack(stacked, plan), params)
  assert_trees_equal(stack(unstack(stacked, plan), plan), stacked)


@given(plans(12))
def test_shapes_stack_like_arrays(plan):
  params = layers(plan)
  stacked = stack(params, plan)
  assert stack(shapes(params), plan) == shapes(stacked)
  assert unstack(shapes(stacked), plan) == shapes(params)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["dense", "0:1-5", "1:2,3:4", "0:1,2:3,4:5"])
@pytest.mark.parametrize("donate", [False, True])
def test_jax_arrays_stack_like_numpys(text, donate):
  plan = SharingPlan.parse(text, 6)
  params = layers(plan, JAX)
  stacked = stack(params, plan, donate=donate)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stacked))
  assert_trees_equal(stacked, stack(layers(plan), plan))
  assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(params["layers"]))
  again = unstack(stacked, plan, donate=donate)
  assert_trees_equal(again, layers(plan))
  assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(stacked["runs"]))
  # What both layouts share is handed on, not copied and not freed.
  assert again["embed"]["embedding"] is params["embed"]["embedding"]


def test_stack_joins_other_leaves():
  plan = SharingPlan.parse("0:1-2", 3)
  names = jax.tree.map(lambda _: object(), layers(plan))
  joined = stack(names, plan, join=lambda leaves, leading: (len(leaves), leading))
  assert joined["runs"]["0"]["followers"]["mlp_norm"]["scale"] == (2, (1, 2))


@given(plans(12))
def test_prune_drops_queries_and_keys_of_followers(plan):
  dense = layers(SharingPlan.dense(plan.num_layers))
  before = jax.tree.leaves(dense)
  assert_trees_equal(prune(dense, plan), layers(plan))
  # What it was given is as it was.
  assert all(a is b for a, b in zip(jax.tree.leaves(dense), before, strict=True))
  assert_trees_equal(prune(prune(dense, plan), plan), layers(plan))


@given(plans(8), st.data())
def test_prune_further(plan, data):
  """Pruning in two steps is pruning at once; a follower never becomes an anchor."""
  more = data.draw(st.sets(st.integers(1, plan.num_layers - 1))) if plan.num_layers > 1 else set()
  further = SharingPlan.from_followers(plan.num_layers, more | set(plan.followers))
  dense = layers(SharingPlan.dense(plan.num_layers))
  assert_trees_equal(prune(prune(dense, plan), further), prune(dense, further))
  if further != plan:
    with pytest.raises(ValueError, match="but the parameters have no q_proj and k_proj for them; start from the dense"):
      prune(prune(dense, further), plan)


def test_either_layout():
  plan = SharingPlan.parse("0:1", 3)
  params = layers(plan)
  stacked = stack(params, plan)
  same = lambda a, b: all(map(operator.is_, jax.tree.leaves(a), jax.tree.leaves(b)))
  assert same(as_layers(params, plan), params)
  assert same(as_runs(stacked, plan), stacked)
  # As `model.init` returns them, with their logical axes.
  boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), params)
  assert same(as_layers(boxed, plan), params)
  assert_trees_equal(as_layers(stacked, plan), params)
  assert_trees_equal(as_runs(params, plan), stacked)


class TestErrors:
  plan = SharingPlan.parse("1:2", 4)

  def test_another_layout(self):
    params = layers(self.plan)
    with pytest.raises(ValueError, match="stack takes the layer layout, .* have .*'runs'"):
      stack(stack(params, self.plan), self.plan)
    with pytest.raises(ValueError, match="unstack takes the run layout, .* have .*'layers'"):
      unstack(params, self.plan)

  def test_another_plan(self):
    params = layers(self.plan)
    with pytest.raises(ValueError, match="the plan 'dense' makes layers \\[2\\] anchors, but .* no q_proj and k_proj"):
      stack(params, SharingPlan.dense(4))
    with pytest.raises(
      ValueError, match="the plan '1:2-3' makes layers \\[3\\] followers, .* still have q_proj and k_proj; prune first"
    ):
      stack(params, SharingPlan.parse("1:2-3", 4))
    params["layers"]["2"]["attention"]["k_proj"] = params["layers"]["1"]["attention"]["k_proj"]
    with pytest.raises(ValueError, match="layers \\[2\\] followers, but they still have k_proj; prune first"):
      stack(params, self.plan)
    del params["layers"]["2"]["attention"]["k_proj"]
    with pytest.raises(ValueError, match="the parameters have runs \\['0', '1', '2'\\], the plan 'dense' has 1"):
      unstack(stack(params, self.plan), SharingPlan.dense(4))

  def test_as_layers_of_another_model(self):
    params = layers(self.plan)
    with pytest.raises(ValueError, match="the parameters have 4 layers, the plan is for 3"):
      as_layers(params, SharingPlan.dense(3))
    with pytest.raises(ValueError, match="the plan 'dense' makes layers \\[2\\] anchors, but .* no q_proj and k_proj"):
      as_layers(params, SharingPlan.dense(4))

  def test_another_depth(self):
    with pytest.raises(ValueError, match="the parameters have 4 layers, the plan is for 5"):
      stack(layers(self.plan), SharingPlan.parse("1:2", 5))

  def test_runs_of_other_sizes(self):
    """As many runs as the plan has, of other lengths."""
    stacked = stack(layers(SharingPlan.parse("1:2", 4)), self.plan)
    with pytest.raises(ValueError, match="run"):
      unstack(stacked, SharingPlan.parse("2:3", 5))
