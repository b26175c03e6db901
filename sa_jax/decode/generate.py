"""`generate`: prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sa_jax.decode.batcher import Batcher
from sa_jax.decode.engine import Engine, Prompts, capacity_for, check_seed, pad_to
from sa_jax.decode.padding import to_right_padded
from sa_jax.decode.sampling import Sampler
from sa_jax.distributed import check_same_rows
from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.trees import Params


class Generated(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: int32 ``[B, max_new_tokens]``, padding after a row's end.
    lengths: int32 ``[B]``, new tokens of each row, its end token included.
  """

  tokens: np.ndarray
  lengths: np.ndarray


def generate(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  lengths: ArrayLike | None = None,
  max_new_tokens: int = 24,
  temperature: float = 0.0,
  seed: int = 0,
  *,
  top_k: int | None = None,
  top_p: float | None = None,
  attention_mask: ArrayLike | None = None,
  cache_length: int | None = None,
  slots: int = 64,
) -> Generated:
  """Continues prompts until an end token or ``max_new_tokens``.

  A row's tokens depend on its prompt, the seed and its number in the batch, and not on the other rows.

  Args:
    model: from `from_pretrained`.
    params: in either layout. The run layout is converted, which takes a second copy of the weights while this runs:
      open the model with ``layout="layers"`` to generate without it.
    tokens: int ``[B, T]``, right-padded; padded on either side if ``attention_mask`` is given.
    lengths: int ``[B]`` prompt lengths; None when rows are full.
    max_new_tokens: most tokens to add to a row.
    temperature: 0 takes the likeliest token; otherwise see `Sampler`.
    seed: of the samples.
    top_k: see `Sampler`.
    top_p: see `Sampler`.
    attention_mask: ``[B, T]``, 1 at tokens and 0 at padding, in Hugging Face's manner; instead of ``lengths``.
    cache_length: slots a row of the cache; enough, rounded up, when None.
    slots: rows in the batch at once; more prompts than that go through continuous batching (see `Batcher`).

  Raises:
    UserError: if a token is not in the vocabulary, a length does not fit, or the prompts and their continuations do
      not fit the cache.
  """
  sampler = Sampler(temperature, top_k, top_p)
  tokens = np.asarray(tokens)
  if attention_mask is not None:
    if lengths is not None:
      raise UserError("give lengths or attention_mask, not both")
    tokens, lengths = to_right_padded(tokens, np.asarray(attention_mask))
  if tokens.ndim == 2 and lengths is None:
    lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32)
  lengths = np.asarray(lengths)
  check_tokens(tokens, lengths, model.config.vocab_size)
  check_seed(seed)
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
  needed = _slots_for(int(lengths.max()), max_new_tokens)
  capacity = capacity_for(max(needed, tokens.shape[1])) if cache_length is None else cache_length
  if needed > capacity or tokens.shape[1] > capacity:
    raise UserError(
      f"prompts of up to {int(lengths.max())} tokens (rows of {tokens.shape[1]}) with {max_new_tokens} new ones do not "
      f"fit a cache of {capacity} slots; {max(needed, tokens.shape[1])} are needed"
    )
  check_same_rows(params, "prompts", tokens)
  prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
  if len(prompts) > slots:
    batcher = Batcher(model, params, slots=slots, capacity=capacity, sampler=sampler)
    rows = _continuous(batcher, prompts, max_new_tokens, seed)
  else:
    length, new, numbers = pad_to(tokens.shape[1], capacity), [max_new_tokens] * len(prompts), range(len(prompts))
    rows = _static(model, params, Prompts.of(prompts, length, new, seed, numbers), sampler, capacity)
  config = model.config
  pad = config.pad_token_id if config.pad_token_id is not None else (*config.eos_token_ids, 0)[0]
  return Generated(np.where(rows < 0, pad, rows).astype(np.int32), (rows >= 0).sum(axis=1).astype(np.int32))


def stream(
  model: Transformer,
  params: Params,
  prompt: ArrayLike,
  max_new_tokens: int = 24,
  temperature: float = 0.0,
  seed: int = 0,
  *,
  top_k: int | None = None,
  top_p: float | None = None,
  chunk: int = 8,
) -> Iterator[list[int]]:
  """Continues one prompt, and yields new tokens as they come: together, those of `generate` for it alone.

  Args:
    model: from `from_pretrained`.
    params: in either layout; see `generate`.
    prompt: int ``[T]``.
    max_new_tokens: most tokens to add.
    temperature: 0 takes the likeliest token; otherwise see `Sampler`.
    seed: of the samples.
    top_k: see `Sampler`.
    top_p: see `Sampler`.
    chunk: tokens that the device generates between two yields.

  Raises:
    UserError: as `generate`.
  """
  prompt = np.asarray(prompt)
  capacity = capacity_for(max(1, _slots_for(prompt.size, max_new_tokens)))
  sampler = Sampler(temperature, top_k, top_p)
  batcher = Batcher(model, params, slots=1, capacity=capacity, sampler=sampler, chunk=chunk)
  request = batcher.submit(prompt, max_new_tokens, seed=seed)
  while batcher.busy:
    yield batcher.step()[id(request)]


def _slots_for(prompt: int, new: int) -> int:
  """Cache slots of a row: its last token is returned and never cached."""
  return prompt + new - 1


def _static(model: Transformer, params: Params, prompts: Prompts, sampler: Sampler, capacity: int) -> np.ndarray:
  """All rows in one batch; int32 ``[B, most new tokens]``, -1 after a row's end."""
  layers, new = as_layers(params, model.plan), int(prompts.new.max())
  engine = Engine.of(model, layers)
  state = engine.prefill(layers, prompts, sampler=sampler, capacity=capacity)
  width = pad_to(new - 1, capacity)
  first = fetch(state.tokens)[:, None]  # the state is given away
  _, rest = engine.decode(layers, state, sampler=sampler, steps=np.int32(new - 1), width=width)
  return np.concatenate([first, fetch(rest)[:, : new - 1]], axis=1)


def _continuous(batcher: Batcher, prompts: Sequence[np.ndarray], max_new_tokens: int, seed: int) -> np.ndarray:
  """More rows than slots: as `_static`, by continuous batching."""
  requests = [batcher.submit(row, max_new_tokens, seed=seed, row=number) for number, row in enumerate(prompts)]
  batcher.run()
  rows = np.full((len(prompts), max_new_tokens), -1, np.int32)
  for row, request in zip(rows, requests, strict=True):
    row[: len(request.tokens)] = request.tokens
  return rows
