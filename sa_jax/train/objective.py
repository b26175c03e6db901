"""What training minimises. Computation is in the model's ``dtype``, whatever dtype the parameters have."""

from __future__ import annotations

from typing import Any

import jax

from sa_jax import ops
from sa_jax.nn import Transformer
from sa_jax.train.batch import Batch
from sa_jax.train.step import Objective


def next_token(model: Transformer, z_loss: float = 0.0) -> Objective:
  """Cross-entropy of each token given those before it in its document.

  Args:
    model: whose parameters, in either layout, are trained; nothing is frozen.
    z_loss: see `sa_jax.ops.next_token_loss`.
  """

  def objective(params: Any, frozen: Any, batch: Batch, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    del frozen, step
    hidden = model.apply({"params": params}, batch.tokens, segments=batch.segments, method="hidden")
    return ops.next_token_loss(_head(model, params), hidden, batch.tokens, batch.weights, z_loss=z_loss)

  return objective


def _head(model: Transformer, params: Any) -> ops.Head:
  return lambda hidden: model.apply({"params": params}, hidden, method="logits")
