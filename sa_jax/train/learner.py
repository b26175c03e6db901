"""What is trained, what is frozen, and how they become the final model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa_jax.config import ModelConfig, RematPolicy
from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer, from_pretrained
from sa_jax.formats.load import describe
from sa_jax.nn import GradualTransformer, Transformer
from sa_jax.params import prune, stack_unpruned
from sa_jax.plan import as_plan
from sa_jax.sharding import abstract_params, param_shardings, tree_shardings
from sa_jax.train.config import TrainConfig
from sa_jax.train.gradual import rising
from sa_jax.train.lora import abstract_adapters, adapted, init_adapters, merge
from sa_jax.train.objective import RouterConfig, distill, next_token
from sa_jax.train.step import Objective
from sa_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Learner:
  """Trained and frozen parameters, and the objective.

  Attributes:
    start: returns the initial trained parameters.
    abstract: their shapes and dtypes.
    shardings: their shardings.
    frozen: frozen parameters: ``base``, which adapters adapt, and ``teacher``.
    objective: the training objective, given a remat policy.
    evaluation: the evaluation objective: the plain loss of the fully shared model.
    finish: trained and frozen parameters → the model's parameters, in the run layout.
  """

  start: Callable[[], Tree]
  abstract: Tree
  shardings: Tree
  frozen: dict[str, Any]
  objective: Callable[[RematPolicy], Objective]
  evaluation: Objective
  finish: Callable[[Tree, Tree], Tree]


def model_of(config: TrainConfig, tokenizer: Tokenizer) -> Transformer:
  """The model of a run, with its plan and compute settings; trained parameters are float32.

  From scratch, start and end tokens are the tokenizer's, unless the config's own shape sets them.

  Raises:
    UserError: if the checkpoint or the plan does not fit, or no ``config.json`` can describe the model.
  """
  if config.model is not None:
    model = describe(config.model, config.plan)
  else:
    shape = config.shape or ModelConfig.preset(config.preset or "", bos_token_id=None, eos_token_ids=())
    begin, end = (tokenizer.special_id(name) for name in ("bos_token", "eos_token"))
    if shape.bos_token_id is None:
      shape = dataclasses.replace(shape, bos_token_id=begin)
    if not shape.eos_token_ids and end is not None:
      shape = dataclasses.replace(shape, eos_token_ids=(end,))
    model = Transformer(shape, as_plan(config.plan, shape.num_layers))
  model.config.to_hf()  # fails now, not when the trained model is to be written
  computed = dataclasses.replace(
    model.config, dtype=config.dtype, param_dtype="float32", remat="none", group_backward=True
  )
  return Transformer(computed, model.plan)


def make_learner(config: TrainConfig, model: Transformer, mesh: Mesh) -> Learner:
  """Decides from the config which parameters are trained.

  Raises:
    UserError: if the model does not fit the mesh, or a checkpoint lacks weights.
  """
  if model.config.experts is None and config.router != RouterConfig():
    raise UserError("`load_balance` and `router_z_loss` need a mixture of experts, and this model is not one")
  student = _student(config, model)
  objective = functools.partial(_objective, config, model)
  frozen: dict[str, Any] = {}
  if config.mode == "distill":
    frozen["teacher"] = _unpruned(config.teacher or config.model, _teacher(model), config.dtype, mesh)
  finish = lambda params: prune(params, model.plan) if config.gradual_steps else params
  if config.method == "full":
    shardings = param_shardings(student, mesh)
    return Learner(
      start=lambda: _start(config, student, mesh, shardings),
      abstract=abstract_params(student),
      shardings=shardings,
      frozen=frozen,
      objective=objective,
      evaluation=next_token(student),
      finish=lambda params, frozen: finish(params),
    )
  frozen["base"] = _base(config, student, mesh, frozen.get("teacher"))
  lora, key = config.lora, jax.random.key(config.seed)
  shardings = tree_shardings(abstract_adapters(student, lora, boxed=True), mesh)
  base = lambda frozen: frozen["base"]
  return Learner(
    start=lambda: jax.jit(lambda key: init_adapters(student, lora, key), out_shardings=shardings)(key),
    abstract=abstract_adapters(student, lora),
    shardings=shardings,
    frozen=frozen,
    objective=lambda remat: adapted(objective(remat), lora, base),
    evaluation=adapted(next_token(student), lora, base),
    finish=lambda params, frozen: finish(merge(frozen["base"], params, lora)),
  )


def _student(config: TrainConfig, model: Transformer) -> Transformer:
  """The model to train, which may blend gradually into the final model."""
  return GradualTransformer(model.config, model.plan) if config.gradual_steps else model


def _teacher(model: Transformer) -> GradualTransformer:
  """The teacher: the dense model, as a gradual model before sharing, so that its blocks match the student's."""
  return GradualTransformer(model.config, model.plan)


def _objective(config: TrainConfig, model: Transformer, remat: RematPolicy) -> Objective:
  """The objective under a remat policy; reads no parameters."""
  student = _student(config, Transformer(dataclasses.replace(model.config, remat=remat), model.plan))
  share = rising(config.gradual_steps) if config.gradual_steps else None
  if config.mode != "distill":
    return next_token(student, z_loss=config.z_loss, share=share, router=config.router)
  how = config.distill
  taught = distill(
    student,
    _teacher(model),
    temperature=how.temperature,
    alpha=how.teacher_weight,
    hidden_weight=how.hidden_weight,
    share=share,
  )
  return _of_part(taught, "teacher")


def _of_part(objective: Objective, name: str) -> Objective:
  """The objective with one entry of the frozen parameters."""
  return lambda params, frozen, batch, step: objective(params, frozen[name], batch, step)


def _start(config: TrainConfig, student: Transformer, mesh: Mesh, shardings: Tree) -> Tree:
  """The checkpoint's parameters, or random ones, in float32 and the run layout, created with their shardings."""
  if config.model is None:
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = lambda key: nn.unbox(student.init(key, tokens))["params"]
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
  if isinstance(student, GradualTransformer):
    return _unpruned(config.model, student, "float32", mesh)
  return from_pretrained(config.model, student.plan, "float32", mesh)[1]


def _base(config: TrainConfig, student: Transformer, mesh: Mesh, teacher: Tree) -> Tree:
  """The adapters' base parameters, in the compute dtype; the teacher's arrays, if both come from one checkpoint."""
  gradual = isinstance(student, GradualTransformer)
  if teacher is not None and config.teacher in (None, config.model):
    return teacher if gradual else prune(teacher, student.plan)
  if gradual:
    return _unpruned(config.model, student, config.dtype, mesh)
  return from_pretrained(config.model or "", student.plan, config.dtype, mesh)[1]


def _unpruned(path: Path | None, model: Transformer, dtype: str, mesh: Mesh) -> Tree:
  """The dense parameters of a checkpoint, stacked by the model's plan."""
  layers = from_pretrained(path or "", "dense", dtype, mesh, layout="layers")[1]
  return jax.device_put(stack_unpruned(layers, model.plan), param_shardings(model, mesh))
