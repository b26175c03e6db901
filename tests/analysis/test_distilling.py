"""Distillation in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import distilling
from sa_jax.analysis.align import shared_model
from tests import tiny

DENSE = tiny.model("dense", num_layers=3)
PLAN = sa_jax.SharingPlan.parse("0:1-2", 3).with_head_maps({2: (1, 1, 0, 2)})
ROWS, OTHER = tiny.tokens(400, 16), tiny.tokens(16, 16, seed=1)


@pytest.fixture(scope="module")
def models():
  params = jax.tree.map(jnp.asarray, tiny.params(DENSE))
  return shared_model(DENSE.config, params, PLAN), (DENSE, params)


def divergence(student, teacher):
  """Of the teacher's predictions from the student's on other text, in nats a token."""
  logs = [
    jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, OTHER)[:, :-1]) for model, params in (student, teacher)
  ]
  mine, theirs = (np.asarray(log, np.float64) for log in logs)
  return float(np.mean(np.sum(np.exp(theirs) * (theirs - mine), axis=-1)))


def test_the_student_comes_nearer_and_only_blocks_are_trained(models):
  (student, params), teacher = models
  before = divergence((student, params), teacher)
  done = distilling.distill_rows(
    (student, params), teacher, ROWS, distilling.Distillation(steps=60, batch_size=16, learning_rate=8e-3)
  )
  assert done.steps == len(done.losses) == 60
  # The first loss is the divergence on text like the other.
  assert done.losses[0] == pytest.approx(before, rel=0.2)
  after = divergence((student, done.params), teacher)
  assert after < 0.9 * before
  assert done.losses[-10:].mean() < 0.8 * done.losses[0]
  assert done.params["embed"]["embedding"] is params["embed"]["embedding"]
  assert jax.tree.structure(done.params) == jax.tree.structure(dict(params))
  assert all(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(done.params["layers"]), jax.tree.leaves(params["layers"]), strict=True)
  )


def test_half_precision_is_trained_in_float32(models):
  half = lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  (student, params), (teacher, dense) = models
  how = distilling.Distillation(steps=2, batch_size=4, learning_rate=1e-5)
  done = distilling.distill_rows((student, half(params)), (teacher, half(dense)), ROWS, how)
  assert {leaf.dtype for leaf in jax.tree.leaves(done.params["layers"])} == {jnp.float32.dtype}
  # Steps this small are below bfloat16's last place.
  kernel = done.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
  assert (kernel != kernel.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_time_decides_how_many_steps_there_are(monkeypatch):
  """Half a second a step after the first, which compiles for ten; in 60 seconds there is time for 101."""
  now = [0.0]
  monkeypatch.setattr(distilling.time, "perf_counter", lambda: now[0])
  pace = distilling._Pace(distilling.Distillation(minutes=1.0))
  for done in range(1, 20):
    now[0] += 10.0 if done == 1 else 0.5
    pace.look(done, jnp.float32(0))
  assert pace.steps == 101
  how = distilling.Distillation()
  rates = [how.rate(step, 100) for step in range(100)]
  assert max(rates) == pytest.approx(how.learning_rate, rel=0.02)
  assert rates[0] < 0.3 * how.learning_rate
  assert rates[-1] < 0.01 * how.learning_rate
  assert how.rate(0, 1) > 0


def test_every_row_comes_before_one_comes_again():
  rows = np.arange(20).reshape(10, 2)
  batches = distilling._batches(rows, distilling.Distillation(batch_size=4))
  seen = np.concatenate([next(batches).tokens for _ in range(5)])
  assert sorted(seen[:10, 0]) == sorted(seen[10:, 0]) == sorted(rows[:, 0])


def test_settings_that_make_no_sense():
  with pytest.raises(sa_jax.UserError, match=r"minutes=0 \(must be a positive number\)"):
    distilling.Distillation(minutes=0, teacher_weight=2)
