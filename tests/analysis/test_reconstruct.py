"""Local reconstruction: steps of Adam by hand, and what they are for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import nn
from sa_jax.analysis import reconstruct, walk
from sa_jax.analysis.refit import Refit, refit
from sa_jax.nn import PlanArrays
from tests import tiny

PLAN = sa_jax.SharingPlan.parse("1:2", 3)
DENSE = tiny.model("dense", num_layers=3)
CONFIG = dataclasses.replace(DENSE.config, attention_state="query_key")
TEXT, OTHER = tiny.tokens(64, 16), tiny.tokens(16, 16, seed=1)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


@pytest.fixture(scope="module")
def trace(params):
  return walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TEXT, 64))


def group_of(params, trace, rows=64):
  """Layers 1 and 2, in chunks of so many rows."""
  cut = lambda tree: [jax.tree.map(lambda leaf: leaf[i : i + rows], tree) for i in range(0, 64, rows)]
  blocks = tuple(params["layers"][str(layer)] for layer in (1, 2))
  layers = tuple(PlanArrays.of_layer(layer, CONFIG, PLAN.is_anchor(layer)) for layer in (1, 2))
  stream = tuple(cut(walk.Chunk(trace[0][0].x, trace[0][0].state)))
  return reconstruct.Group(blocks, layers, stream, tuple(tuple(cut(trace[layer][0].x)) for layer in (1, 2)))


def test_distance_and_steps_against_the_blocks_by_hand(params, trace):
  """Chunks make no difference to the distance; two steps are Adam's, relative to the weights."""
  group = group_of(params, trace)

  @jax.jit
  def distance(blocks):
    y, state = nn.AnchorBlock(CONFIG).apply({"params": blocks[0]}, trace[0][0].x)
    follower = sa_jax.prune({"layers": {"0": blocks[0], "1": blocks[1]}}, sa_jax.SharingPlan.parse("0:1", 2))
    z = nn.FollowerBlock(CONFIG).apply({"params": follower["layers"]["1"]}, y, state)
    square = lambda x: jnp.sum(x**2, axis=-1)
    apart = [square(got - trace[layer][0].x) / square(trace[layer][0].x) for layer, got in ((1, y), (2, z))]
    return jnp.stack(apart).mean()

  before = float(distance(group.blocks))
  assert reconstruct.walked(CONFIG, group)[1] == pytest.approx(before, rel=1e-4)
  assert reconstruct.walked(CONFIG, group_of(params, trace, 24))[1] == pytest.approx(before, rel=1e-4)

  how = reconstruct.Reconstruction(epochs=2, learning_rate=1e-3)
  gradient = jax.jit(jax.grad(distance))
  first = gradient(group.blocks)
  rms = lambda p: jnp.sqrt(jnp.mean(p**2))
  # Adam's first step is the gradient's sign.
  start = lambda p, g: p - how.rate(0, 2) * rms(p) * g / (jnp.abs(g) + 1e-8)
  blocks = jax.tree.map(start, group.blocks, first)
  second = gradient(blocks)
  mean = lambda decay, one, two: (decay * (1 - decay) * one + (1 - decay) * two) / (1 - decay**2)
  update = lambda p, g, h: p - how.rate(1, 2) * rms(p) * mean(0.9, g, h) / (jnp.sqrt(mean(0.99, g * g, h * h)) + 1e-8)
  blocks = jax.tree.map(update, blocks, first, second)
  got = reconstruct.reconstruct(CONFIG, group, how)
  end = reconstruct.walked(CONFIG, got)[1]
  assert end == pytest.approx(float(distance(blocks)), rel=1e-4)
  assert end < before
  for mine, theirs in zip(jax.tree.leaves(got.blocks), jax.tree.leaves(blocks), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_what_does_not_help_is_not_kept(params):
  """With an absurd rate, the model is the one that was solved for."""
  plain = refit(DENSE, params, PLAN, TEXT, Refit(mlp=True), chunk=24)
  made = refit(DENSE, params, PLAN, TEXT, Refit(mlp=True, local_epochs=2, local_rate=30.0), chunk=24)
  (report,) = [each for each in made.reports if each.part == "group"]
  assert report.after == report.before > 0
  jax.tree.map(np.testing.assert_array_equal, made.params, plain.params)
  with pytest.raises(sa_jax.UserError, match=r"epochs=0 \(must be at least 1\)"):
    reconstruct.Reconstruction(epochs=0)


def test_a_refit_with_reconstruction_is_nearer_on_other_text(params):
  """The group is trained after it was solved for; its blocks come nearer on text that nothing was fitted to."""
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, OTHER, 16))
  text = tiny.tokens(256, 16, seed=2)

  def distance(how):
    made = refit(DENSE, params, PLAN, text, how, chunk=64)
    x, state = walk.Chunk(trace[0][0].x, trace[0][0].state).x, None
    x, state = nn.AnchorBlock(CONFIG).apply({"params": made.params["layers"]["1"]}, x)
    x = nn.FollowerBlock(CONFIG).apply({"params": made.params["layers"]["2"]}, x, state)
    return float(jnp.mean((x - trace[2][0].x) ** 2)), [each for each in made.reports if each.part == "group"]

  plain, none = distance(Refit(mlp=True))
  nearer, reports = distance(Refit(mlp=True, local_epochs=12, local_rate=0.01))
  assert nearer < 0.95 * plain
  assert not none
  assert [report.layer for report in reports] == [1]
  assert all(report.after < report.before for report in reports)


def test_half_precision_is_trained_in_float32(params, trace):
  """Most steps are smaller than half of bfloat16's last place: in bfloat16 they would be rounded away."""
  how = reconstruct.Reconstruction(epochs=16, learning_rate=1e-3)
  group = group_of(params, trace)
  rounded = group._replace(blocks=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), group.blocks))

  def gain(group):
    made = reconstruct.reconstruct(CONFIG, group, how)
    dtypes = lambda blocks: {leaf.dtype for leaf in jax.tree.leaves(blocks)}
    assert dtypes(made.blocks) == dtypes(group.blocks)
    return reconstruct.walked(CONFIG, group)[1] - reconstruct.walked(CONFIG, made)[1]

  assert gain(rounded) == pytest.approx(gain(group), rel=0.1)
