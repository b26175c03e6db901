"""Perplexity of token rows."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sa_jax import ops
from sa_jax.display import Progress, count, table
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import fetch_each, program
from sa_jax.sharding import traced_where_parameters_are
from sa_jax.trees import Params


class Perplexity(NamedTuple):
  """The result of `perplexity`.

  Attributes:
    perplexity: exp of the mean negative log-likelihood.
    loss: the mean negative log-likelihood per predicted token, in nats.
    tokens: number of predicted tokens.
  """

  perplexity: float
  loss: float
  tokens: int

  def _repr_html_(self) -> str:
    """A table, for notebooks."""
    loss = ("loss, nats per token", f"{self.loss:.4f}")
    return table([("perplexity", f"{self.perplexity:.2f}"), loss, ("tokens predicted", f"{self.tokens:,}")])


def check_length(length: int) -> None:
  """Checks that rows of this length have something to predict.

  Raises:
    UserError: if they do not.
  """
  if length < 2:
    raise UserError(f"rows need at least 2 tokens, one to predict from and one to predict, not {length}")


def rows_of(
  tokens: Sequence[int], length: int, rows: int | None = None, start: int | Sequence[int] | None = None
) -> np.ndarray:
  """The first tokens of a text as full rows; a remainder shorter than a row is dropped.

  Models trained with a start token score badly without it: put it at the start of every row. It is never predicted, and
  does not count in any score.

  Args:
    tokens: of one text.
    length: tokens per row, at least 2.
    rows: maximum number of rows; None for all.
    start: one or more tokens that each row begins with, such as from `Tokenizer.opening`; None for none.

  Returns:
    int32 ``[rows, length]``.

  Raises:
    UserError: if the text is shorter than one row, or than the requested rows.
  """
  check_length(length)
  if rows is not None and rows < 1:
    raise UserError(f"at least one row is needed, not {rows}")
  opening = np.atleast_1d(np.asarray([] if start is None else start, np.int32))
  own = length - len(opening)
  if own < 1:
    raise UserError(f"rows of {length} tokens have no room for text after {len(opening)} start tokens")
  fits = len(tokens) // own
  if fits < (rows or 1):
    longest = len(tokens) // (rows or 1) + len(opening)
    ways = ["a longer text"]
    ways += [f"a `length` of at most {longest}"] if longest >= max(2, len(opening) + 1) else []
    ways += [f"at most {count(fits, 'row')} (`rows`)"] if fits else []
    raise UserError(
      f"the text has {count(len(tokens), 'token')}, too few for {count(rows or 1, 'row')} of {count(own, 'token')}; "
      f"use {', or '.join(ways)}"
    )
  taken = rows or fits
  text = np.asarray(tokens[: taken * own], np.int32).reshape(taken, own)
  return np.concatenate([np.tile(opening, (taken, 1)), text], axis=1)


@program(static_argnames="model")
def _log_likelihood(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
  """Sum of the log-likelihoods of each row's tokens after the first, float32 ``[B]``."""
  if model.config.cache_dtype is None:
    logits = apply(model, params, Transformer.__call__, tokens)
  else:
    rows, length = tokens.shape
    cache = Cache.empty(model.config, model.plan, rows, length)
    all_new = ops.Rows(jnp.full(rows, length, jnp.int32), offset=jnp.zeros(rows, jnp.int32))
    hidden, _ = apply(model, params, Transformer.extend, tokens, cache, all_new)
    logits = apply(model, params, Transformer.logits, hidden)
  return ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).sum(axis=-1)


@same_call_on_all
@traced_where_parameters_are
def perplexity(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  *,
  batch_size: int = 1,
  progress: Progress | None = None,
) -> Perplexity:
  """Perplexity of full rows, scored independently: all tokens after a row's first, with equal weight.

  With a quantised cache, tokens attend to the quantised keys and values.

  Args:
    model: the model.
    params: in either layout; the run layout compiles one scan. A quantised cache needs the layer layout; parameters in
      the run layout are copied.
    tokens: int ``[rows, length]``, for example from `rows_of`.
    batch_size: rows per batch; logits take ``batch_size * length * V * 4`` bytes. On a mesh, a batch's rows are split
      over devices: use at least ``data * fsdp``.
    progress: called with (rows done, total rows).

  Raises:
    UserError: if a token is not in the vocabulary, rows are shorter than 2 tokens, or ``batch_size`` is not positive.
  """
  tokens = np.asarray(tokens)
  check_tokens(tokens, None, model.config.vocab_size)
  check_length(tokens.shape[1])
  if batch_size < 1:
    raise UserError(f"batch_size must be at least 1, not {batch_size}")
  params = params if model.config.cache_dtype is None else as_layers(params, model.plan)
  batches = (tokens[start : start + batch_size].astype(np.int32) for start in range(0, len(tokens), batch_size))
  total, done = 0.0, 0
  for rows in fetch_each(_log_likelihood(model, params, batch) for batch in batches):
    total += float(rows.sum(dtype=np.float64))
    done += len(rows)
    if progress is not None:
      progress(done, len(tokens))
  predicted = tokens.shape[0] * (tokens.shape[1] - 1)
  loss = -total / predicted
  with np.errstate(over="ignore"):
    return Perplexity(float(np.exp(loss)), loss, predicted)


def rare_words_unknown(text: str, fewest: int = 3) -> str:
  """Raw WikiText in WikiText-2's form: words that occur fewer than ``fewest`` times become ``<unk>``.

  A model calibrated on raw text has never seen ``<unk>``, a twentieth of WikiText-2's words (Merity et al., arXiv
  1609.07843, section 4.3).
  """
  counts = collections.Counter(text.split())
  return re.sub(r"\S+", lambda word: word[0] if counts[word[0]] >= fewest else "<unk>", text)
