"""Training objectives. They compute in the model's ``dtype``, whatever the parameters' dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sa_jax import ops
from sa_jax.errors import UserError
from sa_jax.fields import NotNegative, check_fields
from sa_jax.nn import BLOCK_OUTPUTS, ROUTER_SCORES, GradualTransformer, Transformer
from sa_jax.nn.typed import apply
from sa_jax.train.batch import Batch
from sa_jax.train.step import EXPERT_TOKENS, LossSums, Objective
from sa_jax.trees import Tree

SharingSchedule = Callable[[jax.Array], jax.Array]
"""A function from the step to how much followers share with their anchors; see `sa_jax.train.rising`."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Additional losses for the routers of a mixture of experts."""

  load_balance: NotNegative = 0.01
  """Weight of the load-balance loss."""
  router_z_loss: NotNegative = 0.0
  """Weight of the router z-loss, the squared logarithm of the softmax denominator."""

  def __post_init__(self) -> None:
    check_fields(self, "router")


def next_token(
  model: Transformer,
  *,
  z_loss: float = 0.0,
  share: SharingSchedule | None = None,
  router: RouterConfig | None = None,
) -> Objective:
  """Cross-entropy of each token given the previous ones in its document.

  Args:
    model: its parameters, in the run layout, are trained; nothing is frozen.
    z_loss: see `sa_jax.ops.next_token_loss`.
    share: the schedule of a `sa_jax.nn.GradualTransformer`; None for full sharing.
    router: additional router losses of a mixture of experts; the objective then also returns the number of tokens per
      expert. With gradient accumulation, each microbatch has its own router losses.
  """
  experts = model.config.experts if router is not None else None
  kept = {} if experts is None else {"mutable": [ROUTER_SCORES]}

  def objective(params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> LossSums:
    del frozen
    out = _hidden(model, params, batch, {} if share is None else {"share": share(step)}, **kept)
    hidden, routed = (out, None) if experts is None else out
    total, weight = ops.next_token_loss(_head(model, params), hidden, batch.tokens, batch.weights, z_loss=z_loss)
    if experts is None or router is None:
      return total, weight
    found = _balance(experts, routed, batch)
    # as means over tokens; the main loss is a sum
    to_sum = weight / jnp.maximum(_counting(batch).sum(dtype=jnp.float32), 1.0)
    total += to_sum * (router.load_balance * found.load_balance + router.router_z_loss * found.z)
    aux = {
      "load_balance": to_sum * found.load_balance, "router_z": to_sum * found.z, EXPERT_TOKENS: found.tokens
    }  # fmt: skip
    return total, weight, aux

  return objective


def _balance(experts: ops.Experts, routed: Tree, batch: Batch) -> ops.Balance:
  """The balance over the scores of all routers, of all runs and layers."""
  scores = [leaf.reshape(-1, *leaf.shape[-3:]) for leaf in jax.tree.leaves(routed)]
  return ops.balance(jnp.concatenate(scores), experts, _counting(batch))


def _counting(batch: Batch) -> jax.Array:
  """Which tokens are not padding, as far as the batch tells, bool ``[B, T]``."""
  return jnp.ones(batch.tokens.shape, bool) if batch.segments is None else batch.segments > 0


def distill(
  student: Transformer,
  teacher: Transformer,
  *,
  temperature: float = 1.0,
  alpha: float = 0.5,
  hidden_weight: float = 0.0,
  share: SharingSchedule | None = None,
) -> Objective:
  """Cross-entropy, plus the divergence from a teacher that sees the same tokens.

  A `sa_jax.nn.GradualTransformer` as the teacher is the dense model, because it does not share yet. Its parameters
  contain those of its plan's student (`sa_jax.params.prune`), so that with `sa_jax.train.adapted` both use the same
  frozen arrays.

  Args:
    student: its parameters, in the run layout, are trained.
    teacher: its parameters are frozen.
    temperature: see `sa_jax.ops.Teaching`.
    alpha: see `sa_jax.ops.Teaching`.
    hidden_weight: weight of the distance between each block's output and the teacher's: squared distance over the
      teacher's squared norm, averaged over blocks. It needs a teacher that is a `sa_jax.nn.GradualTransformer` of the
      plan.
    share: the schedule of a student that is a `sa_jax.nn.GradualTransformer`; None for full sharing.

  Raises:
    UserError: if hidden outputs are compared but the models' blocks do not match, or a number is out of range.
  """
  if hidden_weight < 0:
    raise UserError(f"hidden_weight must be 0 or more, not {hidden_weight}")
  if hidden_weight and not (isinstance(teacher, GradualTransformer) and teacher.plan.source == student.plan.source):
    raise UserError("to compare blocks, the teacher must be a GradualTransformer of the student's plan")
  as_dense = {"share": 0.0} if isinstance(teacher, GradualTransformer) else {}

  def objective(params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    sharing = {} if share is None else {"share": share(step)}
    kept = [BLOCK_OUTPUTS] if hidden_weight else []
    hidden, outputs = _hidden(student, params, batch, sharing, mutable=kept)
    frozen = jax.lax.stop_gradient(frozen)
    taught, teacher_outputs = _hidden(teacher, frozen, batch, as_dense, mutable=kept)
    predicted = ops.Predictions(_head(student, params), hidden), ops.Predictions(_head(teacher, frozen), taught)
    how = ops.Teaching(temperature, alpha)
    total, weight = ops.distillation_loss(*predicted, batch.tokens, batch.weights, how=how)
    if hidden_weight:
      distances = jax.tree.leaves(jax.tree.map(_distance, outputs, teacher_outputs))
      mean = sum(each.sum(axis=0) for each in distances) / student.plan.num_layers
      total += hidden_weight * jnp.sum(mean[:, :-1] * batch.weights[:, 1:])
    return total, weight

  return objective


def _hidden(model: Transformer, params: Tree, batch: Batch, sharing: dict[str, Any], **how: Any) -> Tree:
  """The head's input, and the other outputs of ``apply``."""
  method = GradualTransformer.hidden if isinstance(model, GradualTransformer) else Transformer.hidden
  rows = ops.Rows(segments=batch.segments)
  return model.apply({"params": params}, batch.tokens, rows, method=method, **sharing, **how)


def _head(model: Transformer, params: Tree) -> ops.ToLogits:
  return lambda hidden: apply(model, params, Transformer.logits, hidden)


def _distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """Relative squared distances float32 ``[layers, B, T]`` of stacked block outputs ``[..., B, T, D]``."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  norm = jnp.sum(jnp.square(teacher), axis=-1)
  # Zero at padding tokens with a zero embedding; their weight is 0, but the result must not be NaN.
  distance = jnp.sum(jnp.square(student - teacher), axis=-1) / jnp.where(norm > 0, norm, 1.0)
  return distance.reshape(-1, *distance.shape[-2:])
