"""From a config to what the loop runs: data, model, step. What can be wrong is found here, before the first step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sa_jax.config import RematPolicy
from sa_jax.distributed import wait_for_all
from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.programs import fetch
from sa_jax.sharding import abstract_params, named_sharding
from sa_jax.train.batch import Batch
from sa_jax.train.config import TrainConfig
from sa_jax.train.data import BatchIterator, Examples, PackedRows, host_rows
from sa_jax.train.export import write_trained
from sa_jax.train.learner import make_learner, model_of
from sa_jax.train.optimizer import make_optimizer
from sa_jax.train.peft_format import save_adapters
from sa_jax.train.reading import corpus_rows, tokenizer_of, training_data
from sa_jax.train.remat import Remat, fastest
from sa_jax.train.step import TrainState, make_eval, make_state, make_step, state_shardings
from sa_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the loop runs.

  Attributes:
    model: what comes out.
    batches: of the training data, from the beginning.
    identity: by which the data are known again: how many rows, and a checksum; zeros for a source.
    eval_rows: of the evaluation data, if there are any.
    mine: which of a batch's rows this host reads.
    batch_sharding: of a batch's arrays, ``[B, T]``.
    frozen: parameters that stay as they are.
    remat: the step, which donates the state, and what its backward pass recomputes.
    evaluate: ``(params, frozen, batch)`` → sum of losses and its weight.
    make_state: the state before the first step.
    abstract_state: its shapes, dtypes and shardings.
    export: writes the model with trained parameters as a checkpoint.
    adapters: writes trained adapters in PEFT's format; None where there are none, or they are of a model between plans.
  """

  model: Transformer
  batches: Callable[[], BatchIterator]
  identity: tuple[int, int]
  eval_rows: PackedRows | None
  mine: list[int]
  batch_sharding: NamedSharding
  frozen: Tree
  remat: Remat
  evaluate: Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]
  make_state: Callable[[], TrainState]
  abstract_state: Callable[[], TrainState]
  export: Callable[[Tree, Path], None]
  adapters: Callable[[Tree, Path], None] | None


def prepare(
  config: TrainConfig, say: Callable[[str], None] = lambda text: None, source: Examples | None = None
) -> Setup:
  """Reads data and model, and checks that they, the mesh and the config fit each other.

  Args:
    config: the run.
    say: is told what was read, and what was left out.
    source: what is read instead of files.

  Raises:
    UserError: if something does not fit.
  """
  mesh = config.mesh.mesh()
  batch_sharding = named_sharding(mesh, ("batch", "length"))
  if config.batch_size % config.accumulate:
    raise UserError(f"a batch of {config.batch_size} rows does not divide into {config.accumulate} parts")
  host_rows(batch_sharding, config.batch_size // config.accumulate)
  if config.data.length % config.mesh.sequence:
    raise UserError(f"rows of {config.data.length} tokens do not divide over `sequence={config.mesh.sequence}`")
  tokenizer = tokenizer_of(config)
  model = model_of(config, tokenizer)
  mine = host_rows(batch_sharding, config.batch_size)
  data = training_data(config, model, tokenizer, mine, source, say)
  eval_rows = corpus_rows(config, model, tokenizer, config.data.eval, say) if config.data.eval else None
  learner = make_learner(config, model, mesh)
  optimizer = make_optimizer(config.optimizer, config.steps)
  shardings = state_shardings(optimizer, learner.abstract, learner.shardings)

  def abstract_state() -> TrainState:
    shapes = jax.eval_shape(functools.partial(make_state, optimizer), learner.abstract)
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(like, shapes, shardings)

  def step(policy: RematPolicy) -> jax.stages.Wrapped:
    return make_step(learner.objective(policy), optimizer, shardings=shardings, accumulate=config.accumulate)

  if config.remat == "auto":
    batch = _batch_shape(config, data.has_segments, batch_sharding)
    remat = fastest(step, (abstract_state(), learner.frozen, batch), mesh, say)
  else:
    remat = Remat(config.remat, step(config.remat))
  return Setup(
    model=model,
    batches=data.batches,
    identity=data.identity,
    eval_rows=eval_rows,
    mine=mine,
    batch_sharding=batch_sharding,
    frozen=learner.frozen,
    remat=remat,
    evaluate=make_eval(learner.judge, mesh=mesh),
    make_state=lambda: make_state(optimizer, learner.start(), shardings),
    abstract_state=abstract_state,
    export=lambda params, path: write_trained(
      path, model, learner.finish(params, learner.frozen), config.dtype, tokenizer.save
    ),
    adapters=adapters_of(config, model),
  )


def _batch_shape(config: TrainConfig, has_segments: bool, sharding: NamedSharding) -> Batch:
  """A step's batch, as the data make it."""
  of = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.data.length), dtype, sharding=sharding)
  return Batch(of(jnp.int32), of(jnp.float32), of(jnp.int32) if has_segments else None)


def adapters_of(config: TrainConfig, model: Transformer) -> Callable[[Tree, Path], None] | None:
  """What writes a run's adapters, if the model that they are of is the one that training ends with."""
  if config.method != "lora" or config.gradual_steps:
    return None

  def write(params: Tree, path: Path) -> None:
    held = jax.tree.map(fetch, params)
    try:
      if jax.process_index() == 0:
        save_adapters(path, model, held, config.lora, str(config.model))
    finally:  # the others wait here whatever happens to the first
      wait_for_all("adapters written")

  return write


def echo(config: TrainConfig, run: Setup) -> dict[str, str]:
  """What a run is, for people: what it runs on, what is trained on what, and where it is saved."""
  device, mesh = jax.devices()[0], run.batch_sharding.mesh.shape
  count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  whole, trained = count(abstract_params(run.model)), count(run.abstract_state().params)
  tokens = config.batch_size * config.data.length
  epochs = "" if not run.identity[0] else f", {config.steps * config.batch_size / run.identity[0]:.3g} epochs"
  hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
  return {
    "devices": f"{jax.device_count()} × {device.device_kind}{hosts}",
    "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device",
    "parameters": f"{whole / 1e6:,.2f} M; {trained / 1e6:,.2f} M are trained ({config.method}), {config.mode}",
    "plan": f"{run.model.plan}: {len(run.model.plan.followers)} of {run.model.config.num_layers} layers follow",
    "a step": f"{config.batch_size} rows of {config.data.length} tokens, {tokens:,} tokens",
    "steps": f"{config.steps:,}{epochs}, {config.steps * tokens:,} tokens",
    "remat": str(run.remat),
    "saved in": str(config.out),
  }
