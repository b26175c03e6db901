"""Prepares a run from its config: data, model, step. All checks happen here, before the first step."""

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
from sa_jax.display import count
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

_FEW_EPOCHS = 4
"""Repeating data up to this often is about as good as new data (Muennighoff et al., arXiv 2305.16264)."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that the loop uses.

  Attributes:
    model: the final model.
    batches: the training data, from the start.
    identity: number of rows and a checksum, to detect changed data; zeros for a source.
    eval_rows: the evaluation data, if any.
    mine: which rows of a batch this host reads.
    batch_sharding: sharding of a batch's arrays, ``[B, T]``.
    frozen: the frozen parameters.
    remat: the remat policy, with the step, which donates the state.
    evaluate: ``(params, frozen, batch)`` → sum of losses and its weight.
    make_state: creates the initial state.
    abstract_state: its shapes, dtypes and shardings.
    export: writes the model with the trained parameters as a checkpoint.
    adapters: writes trained adapters in PEFT's format; None without adapters, or if they adapt a gradual model.
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
  """Reads data and model, and checks that they fit the mesh, the config and each other.

  Args:
    config: the run.
    say: called with summaries of the data and what was skipped.
    source: examples instead of files.

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
    evaluate=make_eval(learner.evaluation, mesh=mesh),
    make_state=lambda: make_state(optimizer, learner.start(), shardings),
    abstract_state=abstract_state,
    export=lambda params, path: write_trained(
      path, model, learner.finish(params, learner.frozen), config.dtype, tokenizer.save
    ),
    adapters=adapters_of(config, model),
  )


def _batch_shape(config: TrainConfig, has_segments: bool, sharding: NamedSharding) -> Batch:
  """Shapes of a step's batch."""
  of = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.data.length), dtype, sharding=sharding)
  return Batch(of(jnp.int32), of(jnp.float32), of(jnp.int32) if has_segments else None)


def adapters_of(config: TrainConfig, model: Transformer) -> Callable[[Tree, Path], None] | None:
  """A function that writes a run's adapters, or None if they do not adapt the final model."""
  if config.method != "lora" or config.gradual_steps:
    return None

  def write(params: Tree, path: Path) -> None:
    held = jax.tree.map(fetch, params)
    try:
      if jax.process_index() == 0:
        save_adapters(path, model, held, config.lora, str(config.model))
    finally:  # the other processes wait here, even if the first fails
      wait_for_all("adapters written")

  return write


def echo(config: TrainConfig, run: Setup) -> dict[str, str]:
  """A summary of the run: devices, what is trained on which data, and the output folder."""
  device, mesh = jax.devices()[0], run.batch_sharding.mesh.shape
  size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  whole, trained = size(abstract_params(run.model)), size(run.abstract_state().params)
  tokens = config.batch_size * config.data.length
  epochs = "" if not run.identity[0] else f", {_epochs(config, run.identity[0])}"
  hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
  return {
    "devices": f"{jax.device_count()} × {device.device_kind}{hosts}",
    "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device",
    "parameters": f"{whole / 1e6:,.2f} M; {trained / 1e6:,.2f} M are trained ({config.method}), {config.mode}",
    "plan": f"{run.model.plan}: {len(run.model.plan.followers)} of {run.model.config.num_layers} layers follow",
    "a step": f"{config.batch_size} rows of {config.data.length} tokens, {tokens:,} tokens",
    "steps": f"{config.steps:,}{epochs}, {config.steps * tokens:,} tokens",
    "remat": str(run.remat),
    "tokens/s": "without compilation, evaluation and saving",
    "saved in": str(config.out),
  }


def cautions(config: TrainConfig, rows: int) -> list[str]:
  """What a run is likely not meant to do.

  Args:
    config: the run.
    rows: of the training data; 0 if unknown.
  """
  found = []
  if rows and config.steps * config.batch_size > _FEW_EPOCHS * rows:
    found.append(
      f"{count(config.steps, 'step')} of {count(config.batch_size, 'row')} are {_epochs(config, rows)}: more than "
      f"{_FEW_EPOCHS} usually overfit; use fewer steps, smaller batches or more data"
    )
  if rows and config.batch_size > rows:
    found.append(
      f"a batch of {count(config.batch_size, 'row')} is larger than the data ({count(rows, 'row')}): each step repeats "
      "rows; use smaller batches or more data"
    )
  if (warmup := config.optimizer.warmup_steps) > config.steps:
    what = f"the warm-up of {count(warmup, 'step')} is longer than the run ({count(config.steps, 'step')})"
    if config.optimizer.schedule == "constant":
      found.append(f"{what}: the learning rate only reaches {config.steps / warmup:.0%} of its value")
    else:
      found.append(f"{what}: it is shortened, and the learning rate rises up to the last step")
  return found


def _epochs(config: TrainConfig, rows: int) -> str:
  """Such as ``1,140 epochs of 12 rows``."""
  epochs = config.steps * config.batch_size / rows
  number = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
  return f"{number} epoch{'' if number == '1' else 's'} of {count(rows, 'row')}"
