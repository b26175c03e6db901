"""A run's data from its config: tokenizer, rows of files, or a stream of examples."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sa_jax.display import count
from sa_jax.distributed import FOREVER, gathered, run_on_all, run_on_first
from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer, load_tokenizer
from sa_jax.nn import Transformer
from sa_jax.train.config import TrainConfig
from sa_jax.train.data import (
  BatchIterator,
  Corpus,
  Cursor,
  Examples,
  Gathered,
  PackedRows,
  Part,
  Report,
  Shape,
  Stream,
  byte_tokenizer,
  hub_dataset,
  make_rows,
  open_corpus,
  shuffled,
)


class TrainingData(NamedTuple):
  """A source of batches.

  Attributes:
    batches: creates the iterator over this host's rows, at its start.
    identity: number of rows and a checksum, to detect changed data; zeros for streams.
    has_segments: whether the batches have segments.
  """

  batches: Callable[[], BatchIterator]
  identity: tuple[int, int]
  has_segments: bool


def training_data(
  config: TrainConfig,
  model: Transformer,
  tokenizer: Tokenizer,
  mine: Sequence[int],
  source: Examples | None,
  say: Callable[[str], None],
) -> TrainingData:
  """A run's training data: a source, the config's dataset, or its files.

  Args:
    config: the run.
    model: the model to train.
    tokenizer: the model's.
    mine: which rows of a batch this host reads.
    source: examples instead of files.
    say: called with a summary of the data.

  Raises:
    UserError: if there are no data or several kinds, or they are unusable.
  """
  data = config.data
  names = {"train": data.train, "dataset": data.dataset, "source": source}
  if len(given := [name for name, value in names.items() if value is not None and value != ()]) > 1:
    raise UserError(f"give training data in one way: train, dataset or a source, not {' and '.join(given)}")
  if source is None and data.dataset is None:
    rows = corpus_rows(config, model, tokenizer, data.train, say)
    make = functools.partial(shuffled, rows, config.batch_size, config.seed, mine)
    return TrainingData(make, (len(rows), rows.corpus.checksum), rows.has_segments)
  # Hosts that hold the same rows read the same examples.
  part = Part(mine[0] // len(mine), config.batch_size // len(mine))
  if part.count * len(mine) != config.batch_size or list(mine) != list(range(mine[0], mine[0] + len(mine))):
    raise UserError("a source needs a mesh on which each host holds contiguous rows; use another mesh")
  shape = Shape(
    len(mine), data.length, data.packing, data.too_long, model.config.vocab_size, learn_all=config.mode != "sft"
  )
  hub = data.dataset is not None
  say(f"{data.dataset}, {data.split}: read while training" if hub else "a source of examples, read while training")

  def batches() -> BatchIterator:
    # A dataset gives each host its shards; any other source is read by all hosts.
    examples = source if data.dataset is None else hub_dataset(data.dataset, data.subset, data.split, part)
    assert examples is not None
    cursor = Cursor(examples, config.seed, Part() if hub else part)
    return Gathered(Stream(cursor, tokenizer, shape, data.reading), part, gathered)

  return TrainingData(batches, (0, 0), data.packing == "rows")


def tokenizer_of(config: TrainConfig) -> Tokenizer:
  """The tokenizer of the config, else the model's, or bytes for a model from scratch.

  Raises:
    UserError: if it cannot be read.
  """
  source = config.tokenizer or config.model or "bytes"
  tokenizer = byte_tokenizer() if source == "bytes" else load_tokenizer(source)
  return tokenizer if config.date is None else dataclasses.replace(tokenizer, now=_moment(config.date))


def _moment(day: str) -> datetime.datetime:
  """Noon, so that no time zone changes the date."""
  return datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time(12))


def corpus_rows(
  config: TrainConfig, model: Transformer, tokenizer: Tokenizer, paths: Sequence[Path], say: Callable[[str], None]
) -> PackedRows:
  """The rows of files, for a model.

  Raises:
    UserError: if the data are unusable, or have tokens outside the model's vocabulary.
  """
  # The first host fills the cache and the others use it; hosts without a common disk fill their own.
  read = functools.partial(open_corpus, paths, tokenizer, config.data.reading)
  held: list[Corpus] = []
  names = _names(paths)
  run_on_first(f"reading {names}", lambda: held.append(read()))
  corpus = run_on_all(names, lambda: held[0] if held else read(), lambda corpus: corpus.checksum, FOREVER)
  if config.mode != "sft":
    corpus = dataclasses.replace(corpus, trained=np.ones_like(corpus.trained))
  largest = int(corpus.tokens.max())
  if largest >= model.config.vocab_size:
    raise UserError(
      f"the tokenizer encodes the data with token {largest}, but the model's vocabulary has {model.config.vocab_size} "
      "tokens; give the model's own tokenizer (`tokenizer`)"
    )
  rows = make_rows(corpus, config.data.length, config.data.packing, config.data.too_long)
  opening = tokenizer.decode(corpus.start, special=True)
  say(_describe(corpus.report, rows, len(corpus.tokens), paths) + (f", start token {opening}" if opening else ""))
  return rows


def _names(paths: Sequence[Path]) -> str:
  return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _describe(report: Report, rows: PackedRows, tokens: int, paths: Sequence[Path]) -> str:
  left_out = {
    ("bad line", " left out"): report.bad,
    ("sample", " cut"): rows.spans.cut,
    ("piece", " with nothing to learn left out"): rows.spans.barren,
  }
  read = [count(tokens, "token"), count(len(rows), "row")]
  said = [count(number, noun) + what for (noun, what), number in left_out.items() if number]
  return f"{_names(paths)}: " + ", ".join([count(report.documents, "document"), *read, *said])
