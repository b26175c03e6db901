"""From a config to what the loop runs: data, model, step. What can be wrong is found here, before anything compiles."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sa_jax.distributed import wait_for_all
from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer, load_tokenizer
from sa_jax.nn import Transformer
from sa_jax.sharding import make_mesh, named_sharding
from sa_jax.train.batch import Batch
from sa_jax.train.config import MeshConfig, TrainConfig
from sa_jax.train.data import Report, Rows, byte_tokenizer, host_rows, make_rows, open_corpus
from sa_jax.train.export import export
from sa_jax.train.learner import make_learner, model_of
from sa_jax.train.optimizer import make_optimizer
from sa_jax.train.step import Metrics, TrainState, make_eval, make_state, make_step, state_shardings
from sa_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Run:
  """What the loop runs.

  Attributes:
    model: what comes out.
    rows: of the training data.
    eval_rows: of the evaluation data, if there are any.
    mine: which of a batch's rows this host reads.
    batch_sharding: of a batch's arrays, ``[B, T]``.
    frozen: parameters that stay as they are.
    step: ``(state, frozen, batch)`` → the next state and metrics; donates the state.
    evaluate: ``(params, frozen, batch)`` → sum of losses and its weight.
    make_state: the state before the first step.
    abstract_state: its shapes, dtypes and shardings.
    export: writes the model with trained parameters as a checkpoint.
  """

  model: Transformer
  rows: Rows
  eval_rows: Rows | None
  mine: list[int]
  batch_sharding: NamedSharding
  frozen: Tree
  step: Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]
  evaluate: Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]
  make_state: Callable[[], TrainState]
  abstract_state: Callable[[], TrainState]
  export: Callable[[Tree, Path], None]


def prepare(config: TrainConfig, say: Callable[[str], None] = lambda text: None) -> Run:
  """Reads data and model, and checks that they, the mesh and the config fit each other.

  Args:
    config: the run.
    say: is told what was read, and what was left out.

  Raises:
    UserError: if something does not fit.
  """
  mesh = mesh_of(config.mesh)
  batch_sharding = named_sharding(mesh, ("batch", "length"))
  if config.batch_size % config.accumulate:
    raise UserError(f"a batch of {config.batch_size} rows does not divide into {config.accumulate} parts")
  host_rows(batch_sharding, config.batch_size // config.accumulate)
  if config.data.length % config.mesh.sequence:
    raise UserError(f"rows of {config.data.length} tokens do not divide over `sequence={config.mesh.sequence}`")
  tokenizer = tokenizer_of(config)
  model = model_of(config, tokenizer)
  rows = rows_of(config, model, tokenizer, config.data.train, say)
  eval_rows = rows_of(config, model, tokenizer, config.data.eval, say) if config.data.eval else None
  learner = make_learner(config, model, mesh)
  optimizer = make_optimizer(config.optimizer, config.steps)
  shardings = state_shardings(optimizer, learner.abstract, learner.shardings)

  def abstract_state() -> TrainState:
    shapes = jax.eval_shape(functools.partial(make_state, optimizer), learner.abstract)
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(like, shapes, shardings)

  return Run(
    model=model,
    rows=rows,
    eval_rows=eval_rows,
    mine=host_rows(batch_sharding, config.batch_size),
    batch_sharding=batch_sharding,
    frozen=learner.frozen,
    step=make_step(learner.objective, optimizer, shardings=shardings, accumulate=config.accumulate),
    evaluate=make_eval(learner.judge, mesh=mesh),
    make_state=lambda: make_state(optimizer, learner.start(), shardings),
    abstract_state=abstract_state,
    export=lambda params, path: export(
      path, model, learner.finish(params, learner.frozen), config.dtype, tokenizer.save
    ),
  )


def mesh_of(config: MeshConfig) -> Mesh:
  """The mesh over all devices, what is left of them being data-parallel.

  Raises:
    UserError: if the sizes do not fit the devices.
  """
  rest = config.slice * config.fsdp * config.tensor * config.sequence
  data = config.data if config.data is not None else max(jax.device_count() // rest, 1)
  return make_mesh(data, config.fsdp, config.tensor, config.sequence, slice=config.slice)


def tokenizer_of(config: TrainConfig) -> Tokenizer:
  """The tokenizer that the config names, the model's own, or bytes for a model from scratch.

  Raises:
    UserError: if it cannot be read.
  """
  source = config.tokenizer or config.model or "bytes"
  tokenizer = byte_tokenizer() if source == "bytes" else load_tokenizer(source)
  return tokenizer if config.date is None else dataclasses.replace(tokenizer, now=_moment(config.date))


def _moment(day: str) -> datetime.datetime:
  """Midday of a day, which no time zone makes another day."""
  return datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time(12))


def rows_of(
  config: TrainConfig, model: Transformer, tokenizer: Tokenizer, paths: Sequence[Path], say: Callable[[str], None]
) -> Rows:
  """The rows of files, for a model.

  Raises:
    UserError: if the data cannot be used, or have tokens that the model does not know.
  """
  # The first host fills the cache, the others find it filled; those without a common disk fill their own.
  read = functools.partial(open_corpus, paths, tokenizer, config.data.reading)
  if jax.process_index() == 0:
    corpus = read()
  wait_for_all("tokenised")
  if jax.process_index() != 0:
    corpus = read()
  if config.mode != "sft":
    corpus = dataclasses.replace(corpus, trained=np.ones_like(corpus.trained))
  largest = int(corpus.tokens.max())
  if largest >= model.config.vocab_size:
    raise UserError(
      f"the tokenizer makes token {largest} of the data, but the model's vocabulary has {model.config.vocab_size} "
      "tokens; name the tokenizer that belongs to the model (`tokenizer`)"
    )
  rows = make_rows(corpus, config.data.length, config.data.packing, config.data.too_long)
  opening = tokenizer.decode(corpus.start, special=True)
  say(_describe(corpus.report, rows, len(corpus.tokens), paths) + (f", start token {opening}" if opening else ""))
  return rows


def _describe(report: Report, rows: Rows, tokens: int, paths: Sequence[Path]) -> str:
  names = ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
  left_out = {
    "bad lines left out": report.bad,
    "samples cut": rows.spans.cut,
    "pieces with nothing to learn left out": rows.spans.barren,
  }
  said = "".join(f", {count} {what}" for what, count in left_out.items() if count)
  return f"{names}: {report.documents} documents, {tokens:,} tokens, {len(rows)} rows{said}"
