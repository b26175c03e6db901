"""What is trained, what stays, and what is made of both at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa_jax.config import ModelConfig
from sa_jax.convert import from_pretrained
from sa_jax.convert.load import describe
from sa_jax.nn import Transformer
from sa_jax.plan import as_plan
from sa_jax.sharding import abstract_params, param_shardings
from sa_jax.train.config import TrainConfig
from sa_jax.train.objective import next_token
from sa_jax.train.step import Objective


@dataclasses.dataclass(frozen=True)
class Learner:
  """What is trained, and how.

  Attributes:
    model: what comes out.
    start: makes the trained parameters as they are before the first step.
    abstract: their shapes and dtypes.
    shardings: their shardings.
    frozen: parameters that stay as they are.
    objective: what is minimised.
    judge: what is evaluated: the plain loss of the model as it is.
    finish: trained and frozen parameters → those of ``model``, in the run layout.
  """

  model: Transformer
  start: Callable[[], Any]
  abstract: Any
  shardings: Any
  frozen: Any
  objective: Objective
  judge: Objective
  finish: Callable[[Any, Any], Any]


def model_of(config: TrainConfig) -> Transformer:
  """The model that a run starts from, under its plan, as it is computed; parameters are float32.

  Raises:
    ValueError: if the checkpoint or the plan does not fit.
  """
  if config.model is not None:
    model = describe(config.model, config.plan)
  else:
    shape = config.shape or ModelConfig.preset(config.preset or "")
    model = Transformer(shape, as_plan(config.plan, shape.num_layers))
  computed = dataclasses.replace(model.config, dtype=config.dtype, param_dtype="float32", remat=config.remat)
  return Transformer(computed, model.plan)


def make_learner(config: TrainConfig, model: Transformer, mesh: Mesh) -> Learner:
  """Says what of a model is trained, as the config has it.

  Raises:
    ValueError: if the model does not fit the mesh.
  """
  shardings = param_shardings(model, mesh)
  objective = next_token(model, config.z_loss)
  return Learner(
    model=model,
    start=lambda: start_params(config, model, mesh, shardings),
    abstract=abstract_params(model),
    shardings=shardings,
    frozen={},
    objective=objective,
    judge=next_token(model),
    finish=lambda params, frozen: params,
  )


def start_params(config: TrainConfig, model: Transformer, mesh: Mesh, shardings: Any) -> Any:
  """The checkpoint's parameters, or random ones, in float32 and the run layout, each made where it belongs."""
  if config.model is not None:
    return from_pretrained(config.model, model.plan, "float32", mesh)[1]

  def init(key: jax.Array) -> Any:
    return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]

  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
