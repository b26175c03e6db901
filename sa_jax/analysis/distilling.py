"""In-memory distillation: trains a shared model briefly to predict what the dense model predicts.

It starts from a refitted model and takes token rows; for runs with files, checkpoints and several hosts use
`sa_jax.train`. Both use the same objective and step. Embedding and head are frozen: student and teacher share those
arrays.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_jax.analysis.reconstruct import RELATIVE_ADAM, warmed_cosine
from sa_jax.config import FloatDtype
from sa_jax.display import Progress
from sa_jax.distributed import check_call
from sa_jax.errors import UserError
from sa_jax.fields import Count, Portion, Positive, Seed, check_fields
from sa_jax.nn import Transformer
from sa_jax.params import stack, unstack
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch
from sa_jax.sharding import mesh_of
from sa_jax.train.batch import Batch
from sa_jax.train.objective import distill
from sa_jax.train.step import LossSums, Objective, TrainState, make_state, make_step, state_shardings
from sa_jax.trees import Params, Tree

_TRAINED = ("runs", "final_norm")
_TIMED_STEPS = 8
"""Steps after the first, which compiles, that are timed to compute how many steps fit into the time limit."""

_MANY = 1000
"""Total steps assumed for the warm-up until the number of steps is known."""


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Settings of a distillation.

  Attributes:
    minutes: time limit, including compilation.
    steps: number of steps instead of a time limit.
    batch_size: rows per step.
    learning_rate: Adam's peak learning rate, relative to the root mean square of each weight array; warm-up over a
      twentieth of the steps, then cosine decay to 0.
    teacher_weight: weight of the divergence from the dense model; the rest weights the cross-entropy on the text.
    dtype: compute dtype; None for bfloat16 on accelerators and float32 on a CPU. Trained parameters are in float32.
    seed: seed of the row order.

  Raises:
    UserError: if a value is invalid.
  """

  minutes: Positive = 5.0
  steps: Count | None = None
  batch_size: Count = 32
  learning_rate: Positive = 1.2e-3
  teacher_weight: Portion = 1.0
  dtype: FloatDtype | None = None
  seed: Seed = 0

  def __post_init__(self) -> None:
    check_fields(self, "distillation")

  def rate(self, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0."""
    return self.learning_rate * warmed_cosine(step, steps, warmup=0.05)


class Distilled(NamedTuple):
  """What `distill_rows` returns.

  Attributes:
    params: the shared model's, in the layer layout: what was trained in float32, embedding and head unchanged.
    steps: number of steps.
    losses: float64 ``[steps]``, the loss of each step.
  """

  params: Params
  steps: int
  losses: np.ndarray


def distill_rows(
  student: tuple[Transformer, Params],
  teacher: tuple[Transformer, Params],
  rows: np.ndarray,
  how: Distillation,
  progress: Progress | None = None,
) -> Distilled:
  """Trains a shared model to match the predictions of its dense original.

  Args:
    student: the shared model, and its parameters in the layer layout.
    teacher: the dense model, and its parameters in the layer layout.
    rows: int ``[rows, T]``, token rows without padding.
    how: the settings.
    progress: called with (steps done, total steps) as soon as the total is known.

  Raises:
    UserError: if there is no text.
  """
  if not len(rows):
    raise UserError("distillation needs at least one row of text")
  model, params = student
  check_call(params, distill_rows, student, teacher, rows, how, progress)
  dtype = how.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  # Keeping all activations takes more memory, and more time to write, than recomputing the cheap ones.
  computed = lambda model: model.clone(config=dataclasses.replace(model.config, dtype=dtype, remat="dots"))
  runs, frozen = stack(params, model.plan), _frozen(*teacher, jnp.dtype(dtype))
  trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), {name: runs[name] for name in _TRAINED})
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    RELATIVE_ADAM,
    optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=how.learning_rate),
  )
  shardings = None
  if mesh_of(trained) is not None:
    shardings = state_shardings(optimizer, trained, jax.tree.map(lambda leaf: leaf.sharding, trained))
  objective = _objective(computed(model), computed(teacher[0]), how.teacher_weight)
  step = make_step(objective, optimizer, shardings=shardings)
  state = make_state(optimizer, trained, shardings)
  batches, pace = _batches(rows, how), _Pace(how)
  losses: list[jax.Array] = []
  while len(losses) < (pace.steps or math.inf):
    rate = how.rate(len(losses), pace.steps or _MANY)
    with jax.default_matmul_precision("default"):  # even if the caller asks for exact products
      state, metrics = step(_at_rate(state, rate), frozen, next(batches))
    losses.append(metrics.loss)
    pace.look(len(losses), metrics.loss)
    if progress is not None and pace.steps is not None:
      progress(len(losses), pace.steps)
  found = unstack({**runs, **state.params}, model.plan)
  return Distilled(found, len(losses), np.asarray(fetch(losses), np.float64))


class _Pace:
  """The number of steps: the requested number, or what fits into the remaining time.

  Attributes:
    steps: the total; None until it is known.
  """

  def __init__(self, how: Distillation):
    self.steps = how.steps
    self._end = time.perf_counter() + 60 * how.minutes
    self._first = 0.0

  def look(self, done: int, loss: jax.Array) -> None:
    """Records the end of a step; sometimes waits for it, to limit the number of steps in flight."""
    if done in (1, _TIMED_STEPS) or done % 16 == 0:
      loss.block_until_ready()
    now = time.perf_counter()
    if done == 1:
      self._first = now
    if self.steps is None and done == _TIMED_STEPS:
      self.steps = done + max(0, int((self._end - now) / ((now - self._first) / (done - 1))))


def _frozen(model: Transformer, params: Params, dtype: np.dtype) -> Params:
  """The dense model's parameters in the run layout: blocks in the compute dtype, the rest unchanged."""
  runs = stack(params, SharingPlan.dense(model.plan.num_layers))
  return runs | {"runs": jax.tree.map(lambda leaf: leaf.astype(dtype), runs["runs"])}


def _objective(student: Transformer, teacher: Transformer, teacher_weight: float) -> Objective:
  """`sa_jax.train.distill` over the trained parameters; the teacher supplies the others."""
  taught = distill(student, teacher, alpha=teacher_weight)

  def objective(params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> LossSums:
    return taught({**frozen, **params}, frozen, batch, step)

  return objective


def _at_rate(state: TrainState, rate: float) -> TrainState:
  """The state with a different learning rate."""
  *others, last = state.opt_state
  rates = {"learning_rate": jnp.full_like(last.hyperparams["learning_rate"], rate)}
  return dataclasses.replace(state, opt_state=(*others, last._replace(hyperparams=rates)))


def _batches(rows: np.ndarray, how: Distillation) -> Iterator[Batch]:
  """Rows in random order, each once per epoch."""
  generator, size = np.random.default_rng(how.seed), how.batch_size
  order = np.zeros(0, int)
  while True:
    while len(order) < size:
      order = np.concatenate([order, generator.permutation(len(rows))])
    batch, order = rows[order[:size]].astype(np.int32), order[size:]
    weights = np.ones(batch.shape, np.float32)
    weights[:, 0] = 0
    yield Batch(batch, weights)
