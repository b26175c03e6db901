"""What is trained, what stays as it is, and what is made of both at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa_jax.config import ModelConfig
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
  """What is trained, and how.

  Attributes:
    start: makes the trained parameters as they are before the first step.
    abstract: their shapes and dtypes.
    shardings: their shardings.
    frozen: parameters that stay as they are: ``base``, which adapters adapt, and ``teacher``.
    objective: what is minimised.
    judge: what is evaluated: the plain loss of the model, fully shared.
    finish: trained and frozen parameters → those of the model, in the run layout.
  """

  start: Callable[[], Tree]
  abstract: Tree
  shardings: Tree
  frozen: dict[str, Any]
  objective: Objective
  judge: Objective
  finish: Callable[[Tree, Tree], Tree]


def model_of(config: TrainConfig, tokenizer: Tokenizer) -> Transformer:
  """The model that a run makes: its plan, and how it is computed; trained parameters are float32.

  From scratch, it begins and ends texts as the tokenizer does, unless a shape of the config's own says otherwise.

  Raises:
    UserError: if the checkpoint or the plan does not fit.
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
  computed = dataclasses.replace(
    model.config, dtype=config.dtype, param_dtype="float32", remat=config.remat, group_backward=True
  )
  return Transformer(computed, model.plan)


def make_learner(config: TrainConfig, model: Transformer, mesh: Mesh) -> Learner:
  """Says what of a model is trained, as the config has it.

  Raises:
    UserError: if the model does not fit the mesh, or a checkpoint lacks weights.
  """
  student = GradualTransformer(model.config, model.plan) if config.gradual_steps else model
  share = rising(config.gradual_steps) if config.gradual_steps else None
  frozen: dict[str, Any] = {}
  if config.mode == "distill":
    # Before it shares it is the dense model, and its blocks correspond to the student's.
    teacher = GradualTransformer(model.config, model.plan)
    frozen["teacher"] = _unpruned(config.teacher or config.model, teacher, config.dtype, mesh)
    taught = distill(
      student,
      teacher,
      temperature=config.distill.temperature,
      alpha=config.distill.teacher_weight,
      hidden_weight=config.distill.hidden_weight,
      share=share,
    )
    objective = _of_part(taught, "teacher")
  else:
    if model.config.experts is None and config.router != RouterConfig():
      raise UserError("`load_balance` and `router_z_loss` are of mixtures of experts, and this model is none")
    objective = next_token(student, z_loss=config.z_loss, share=share, router=config.router)
  finish = lambda params: prune(params, model.plan) if config.gradual_steps else params
  if config.method == "full":
    shardings = param_shardings(student, mesh)
    return Learner(
      start=lambda: _start(config, student, mesh, shardings),
      abstract=abstract_params(student),
      shardings=shardings,
      frozen=frozen,
      objective=objective,
      judge=next_token(student),
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
    objective=adapted(objective, lora, base),
    judge=adapted(next_token(student), lora, base),
    finish=lambda params, frozen: finish(merge(frozen["base"], params, lora)),
  )


def _of_part(objective: Objective, name: str) -> Objective:
  """The objective, which is given one part of what is frozen."""
  return lambda params, frozen, batch, step: objective(params, frozen[name], batch, step)


def _start(config: TrainConfig, student: Transformer, mesh: Mesh, shardings: Tree) -> Tree:
  """The checkpoint's parameters, or random ones, in float32 and the run layout, each made where it belongs."""
  if config.model is None:
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = lambda key: nn.unbox(student.init(key, tokens))["params"]
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
  if isinstance(student, GradualTransformer):
    return _unpruned(config.model, student, "float32", mesh)
  return from_pretrained(config.model, student.plan, "float32", mesh)[1]


def _base(config: TrainConfig, student: Transformer, mesh: Mesh, teacher: Tree) -> Tree:
  """What adapters adapt, in the dtype of computation; the teacher's arrays, where the two have one origin."""
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
