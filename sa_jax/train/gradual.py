"""Gradual sharing: blends from the dense model to the plan during training.

Followers start with their own attention weights and end with their anchor's: ``λ P_anchor + (1 - λ) P_own``, with λ
rising from 0 to 1. Then their queries and keys are unused: `sa_jax.prune` drops them, leaving the plan's model.

    model = nn.GradualTransformer(config, plan)
    params = stack_unpruned(dense, plan)
    objective = next_token(model, share=rising(1000))
    …
    params = prune(params, plan)  # of Transformer(config, plan)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError


def rising(steps: int, start: int = 0) -> Callable[[jax.Array], jax.Array]:
  """λ as a function of the step, float32: 0 up to ``start``, then linearly to 1 over ``steps``.

  Args:
    steps: number of steps over which it rises, at least 1.
    start: the last step at which it is 0.

  Returns:
    A function from an int ``[]`` step to a float32 ``[]``.

  Raises:
    UserError: if a number is negative, or ``steps`` is 0.
  """
  if steps < 1 or start < 0:
    raise UserError(f"gradual sharing needs at least 1 step and a start of 0 or later, not {steps} steps from {start}")
  return lambda step: jnp.clip((step.astype(jnp.float32) - start) / steps, 0.0, 1.0)
