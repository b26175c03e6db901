"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import optax

from sa_jax.errors import UserError
from sa_jax.fields import Constraint, Natural, NotNegative, Portion, Positive, check_fields
from sa_jax.trees import Tree

# Norm scales, biases and attention sinks: decaying them towards zero is meaningless.
_UNDECAYED = ("scale", "bias", "sinks")
Decay = Annotated[float, Constraint(lambda number: 0 <= number < 1, "0 to below 1")]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov & Hutter, arXiv 1711.05101), its schedule, and clipping.

  Raises:
    UserError: if a value makes no sense.
  """

  learning_rate: Positive = 3e-4
  """Learning rate after warm-up."""
  warmup_steps: Natural = 100
  """Steps over which it rises linearly from 0."""
  schedule: Literal["cosine", "constant"] = "cosine"
  """After warm-up: cosine falls over the whole run; constant stays, so that a run can be extended."""
  final_fraction: Portion = 0.1
  """Fraction of the learning rate at the end of the cosine."""
  b1: Decay = 0.9
  """Decay of the mean of gradients."""
  b2: Decay = 0.95
  """Decay of the mean of their squares."""
  eps: Positive = 1e-8
  """Added to the square root of the latter."""
  weight_decay: NotNegative = 0.1
  """Weight decay of matrices; norms, biases and attention sinks have none."""
  clip_norm: Positive | None = 1.0
  """Maximum global gradient norm; None for no clipping."""

  def __post_init__(self) -> None:
    check_fields(self, "optimizer")


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """The learning rate per update, counted from 0; warm-up before a cosine is limited to the length of the run.

  Raises:
    UserError: if ``total_steps`` is not positive.
  """
  if total_steps < 1:
    raise UserError(f"training needs at least 1 step, not {total_steps}")
  start = 0.0 if config.warmup_steps else config.learning_rate
  if config.schedule == "constant":
    return optax.warmup_constant_schedule(start, config.learning_rate, config.warmup_steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=start,
    peak_value=config.learning_rate,
    warmup_steps=min(config.warmup_steps, total_steps - 1),
    decay_steps=total_steps,
    end_value=config.final_fraction * config.learning_rate,
  )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
  """Gradient clipping, then AdamW with its schedule.

  Raises:
    UserError: if ``total_steps`` is not positive.
  """
  adamw = optax.adamw(
    schedule(config, total_steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
  )
  return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decayed(params: Tree) -> Tree:
  """A tree like the parameters: whether each has weight decay."""

  def is_decayed(path: Any, _: Any) -> bool:
    return path[-1].key not in _UNDECAYED

  return jax.tree_util.tree_map_with_path(is_decayed, params)
