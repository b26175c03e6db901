"""The train step: gradients, optionally accumulated, and an update that is skipped if they are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.errors import UserError
from sa_jax.sharding import DEFAULT_RULES, Rules, optimizer_shardings, traced_on
from sa_jax.train.batch import Batch
from sa_jax.trees import Tree

EXPERT_TOKENS = "expert_tokens"
"""The name under which an objective returns the number of tokens per expert, ``[layers, X]``."""

Aux = dict[str, jax.Array]
"""Additional outputs of an objective, float32 sums over the batch, by name."""

Sums = tuple[jax.Array, jax.Array, Aux]
"""The sum of losses, its weight, and additional outputs."""

LossSums = tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, Aux]


class Objective(Protocol):
  """A loss: a sum of losses divided by a weight.

  Both are sums over the batch, so the mean loss does not depend on how the batch is split.
  """

  def __call__(self, params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> LossSums:
    """Trainable and frozen parameters, a batch, int32 ``[]`` step → float32 ``[]`` sum of losses, and its weight.

    It may return a third value, additional outputs.
    """
    ...


@struct.dataclass
class TrainState:
  """The train state; the same type also holds its shardings.

  Attributes:
    step: int32 ``[]``, batches seen, including skipped ones.
    params: the trained parameters, usually float32; the compute dtype is the model's.
    opt_state: the optimizer state, in float32.
    skipped: int32 ``[]``, skipped batches, whose loss or gradient was not finite.
    skipped_in_row: int32 ``[]``, consecutive skipped batches up to now.
  """

  step: Tree
  params: Tree
  opt_state: Tree
  skipped: Tree
  skipped_in_row: Tree


@struct.dataclass
class Metrics:
  """The metrics of a step, float32 ``[]`` each.

  Attributes:
    loss: the mean loss.
    grad_norm: global gradient norm, before clipping.
    weight: the mean's denominator; with weights 0 and 1, the number of tokens.
    finite: 1 if loss and gradient are finite; 0 if the step was skipped.
    aux: additional outputs of the objective, divided by the weight; for `EXPERT_TOKENS` the sums.
  """

  loss: jax.Array
  grad_norm: jax.Array
  weight: jax.Array
  finite: jax.Array
  aux: Aux = struct.field(default_factory=dict)


def make_state(
  optimizer: optax.GradientTransformation,
  params: Tree,
  shardings: TrainState | None = None,
  *,
  donate: bool = False,
) -> TrainState:
  """The initial state.

  Args:
    optimizer: as for `make_step`.
    params: the trained parameters. They are copied, because the step donates its state.
    shardings: from `state_shardings`; None leaves arrays where they are.
    donate: whether to use these arrays without copying; they are invalid afterwards.
  """

  def make(params: Tree) -> TrainState:
    zero = jnp.int32(0)
    return TrainState(zero, jax.tree.map(jnp.copy, params), optimizer.init(_as_float32(params)), zero, zero)

  return jax.jit(make, out_shardings=shardings, donate_argnums=0 if donate else ())(params)


def state_shardings(optimizer: optax.GradientTransformation, params: Tree, shardings: Tree) -> TrainState:
  """A `NamedSharding` for each array of the state.

  Args:
    optimizer: as for `make_step`.
    params: the trained parameters, or their shapes and dtypes.
    shardings: the parameters' shardings, such as from `sa_jax.sharding.param_shardings`.
  """
  everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
  optimizer_state = optimizer_shardings(optimizer, jax.eval_shape(_as_float32, params), shardings)
  return TrainState(everywhere, shardings, optimizer_state, everywhere, everywhere)


def make_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  shardings: TrainState | None = None,
  rules: Rules = DEFAULT_RULES,
  accumulate: int = 1,
) -> jax.stages.Wrapped:
  """The train step, jitted: ``step(state, frozen, batch)`` → the next state and `Metrics`. It donates the state.

  Args:
    objective: the objective.
    optimizer: as for `make_state`.
    shardings: the state's, from `state_shardings`; the step runs on their mesh; None for one device.
    rules: how activations are sharded on that mesh.
    accumulate: number of sequential microbatches; it must divide the rows, on a mesh with several slices the rows of
      each slice.

  Raises:
    UserError: if ``accumulate`` is not positive; or from the step, before it compiles, if it does not divide the rows.
  """
  if accumulate < 1:
    raise UserError(f"accumulate must be at least 1, not {accumulate}")
  mesh = None if shardings is None else shardings.step.mesh

  def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
    with traced_on(mesh, rules):
      of_rows = lambda batch: _gradients(objective, state, frozen, batch, accumulate)
      if shardings is None or shardings.step.mesh.shape.get("slice", 1) == 1:
        gradients, (total, weight, aux) = of_rows(batch)
      else:
        gradients, (total, weight, aux) = _over_slices(of_rows, batch, shardings)
      # A batch without anything to predict has no gradient, but is not an error.
      divisor = jnp.where(weight > 0, weight, 1.0)
      gradients = jax.tree.map(lambda gradient: gradient / divisor, gradients)
      loss, norm = total / divisor, optax.tree.norm(gradients)
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)
      wide = _as_float32(state.params)
      # Optax mixes dtypes and ranks, which the caller may have disallowed.
      with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, wide)
      params = jax.tree.map(lambda p, u, old: (p + u).astype(old.dtype), wide, updates, state.params)
      keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
      skipped = 1 - finite.astype(jnp.int32)
      following = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skipped,
        skipped_in_row=(state.skipped_in_row + 1) * skipped,
      )
      aux = {name: value if name == EXPERT_TOKENS else value / divisor for name, value in aux.items()}
      return following, Metrics(loss, norm, weight, finite.astype(jnp.float32), aux)

  outputs = None if shardings is None else (shardings, shardings.step)
  return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def make_eval(objective: Objective, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES) -> jax.stages.Wrapped:
  """Evaluates the objective, jitted: ``(params, frozen, batch)`` → sum of losses and its weight, at step 0."""

  def evaluate(params: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    with traced_on(mesh, rules):
      return objective(params, frozen, batch, jnp.int32(0))[:2]

  return jax.jit(evaluate)


def _over_slices(
  of_rows: Callable[[Batch], tuple[Tree, Sums]], batch: Batch, shardings: TrainState
) -> tuple[Tree, Sums]:
  """`_gradients` per slice, summed over the slices.

  So the network between slices is used once per step, for gradients that are sharded within a slice. XLA would reduce
  each layer's gradients over all devices at once, and again for each microbatch.
  """
  mesh: Mesh = shardings.step.mesh
  slices = mesh.shape["slice"]
  if batch.tokens.shape[0] % slices:
    raise UserError(f"a batch of {batch.tokens.shape[0]} rows does not divide over {slices} slices")
  parts = jax.tree.map(lambda x: x.reshape(slices, -1, *x.shape[1:]), batch)
  without = lambda entry: tuple(axis for axis in entry if axis != "slice") if isinstance(entry, tuple) else entry
  with nn.logical_axis_rules(tuple((name, without(entry)) for name, entry in nn.get_logical_axis_rules())):
    gradients, sums = jax.vmap(of_rows, spmd_axis_name="slice")(parts)
  apart = lambda x, sharding: jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, PartitionSpec("slice", *sharding.spec))
  )
  gradients = jax.tree.map(lambda x: x.sum(axis=0), jax.tree.map(apart, gradients, shardings.params))
  return gradients, jax.tree.map(lambda x: x.sum(axis=0), sums)


def _gradients(
  objective: Objective, state: TrainState, frozen: Tree, batch: Batch, accumulate: int
) -> tuple[Tree, Sums]:
  """Float32 gradients of the sum of losses over the batch, and the objective's outputs."""
  summed = lambda params, part: _sums(*objective(params, frozen, part, state.step))

  def of_part(part: Batch) -> tuple[Tree, Sums]:
    gradients, sums = jax.grad(summed, has_aux=True)(state.params, part)
    return _as_float32(gradients), sums

  if accumulate == 1:
    return of_part(batch)
  rows = batch.tokens.shape[0]
  if rows % accumulate:
    raise UserError(f"a batch of {rows} rows cannot be accumulated in {accumulate} equal parts")
  # Interleave the microbatches, so that each device has its share of every one.
  split = lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
  parts = jax.tree.map(split, batch)
  add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)
  start = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
  )
  return jax.lax.scan(add, start, parts)[0]


def _sums(total: jax.Array, weight: jax.Array, aux: Aux | None = None) -> tuple[jax.Array, Sums]:
  """An objective's outputs in the form of `jax.grad`'s ``has_aux``."""
  return total, (total, weight, aux or {})


def _as_float32(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
