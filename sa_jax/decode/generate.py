"""`generate`: prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from sa_jax.decode.batcher import Batcher, flat_prompt
from sa_jax.decode.engine import Engine, capacity_for, pad_to
from sa_jax.decode.nonfinite import warn_nonfinite
from sa_jax.decode.padding import to_right_padded
from sa_jax.decode.prefix import PromptCache
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.serving import Serving
from sa_jax.decode.settings import Settings
from sa_jax.decode.state import DecodeState, Drawn, Prompts, newest
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.fields import Count, checked
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.sharding import mesh_of
from sa_jax.trees import Params


class Generated(NamedTuple):
  """The result of `generate`.

  Attributes:
    tokens: int32 ``[B, max_new_tokens]``, padding after a row's end.
    lengths: int32 ``[B]``, new tokens of each row, its end token included.
    log_probs: float32 ``[B, max_new_tokens]``, of each token under the model's own logits, zero after a row's end; None
      without ``Sampler(log_probs=True)``.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  log_probs: np.ndarray | None = None

  @classmethod
  def of(cls, model: Transformer, drawn: Drawn) -> Generated:
    """Sampled tokens, with the model's padding after each row's end."""
    there = drawn.tokens >= 0
    tokens = np.where(there, drawn.tokens, pad_token(model)).astype(np.int32)
    return cls(tokens, there.sum(axis=1).astype(np.int32), drawn.log_probs)


@same_call_on_all
def generate(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  lengths: ArrayLike | None = None,
  max_new_tokens: int = 24,
  temperature: float = 0.0,
  seed: int = 0,
  *,
  sampler: Sampler | None = None,
  samples: int = 1,
  prefix: PromptCache | None = None,
  attention_mask: ArrayLike | None = None,
  cache_length: int | None = None,
  slots: int = 64,
) -> Generated:
  """Continues prompts until an end token or ``max_new_tokens``.

  A row's tokens depend on its prompt, the seed and its index in the batch, not on the other rows.

  Args:
    model: from `from_pretrained`.
    params: in either layout. The run layout is converted, which needs a second copy of the weights during the call:
      open the model with ``layout="layers"`` to avoid it.
    tokens: int ``[B, T]``, right-padded; padded on either side if ``attention_mask`` is given.
    lengths: int ``[B]`` prompt lengths; None if rows are full.
    max_new_tokens: max new tokens per row.
    temperature: 0 for greedy; otherwise see `Sampler`.
    seed: seed of the samples.
    sampler: all sampling options, instead of temperature.
    samples: number of continuations per prompt, which is prefilled once. They are consecutive rows in the result, as if
      each row of ``tokens`` were repeated.
    prefix: a cached prefix; see `PromptCache`.
    attention_mask: ``[B, T]``, 1 at tokens and 0 at padding, as in Hugging Face; instead of ``lengths``.
    cache_length: cache slots per row; None for as many as needed, rounded up.
    slots: max rows in a batch; more rows use continuous batching (see `Batcher`).

  Raises:
    UserError: if a token is not in the vocabulary, a length does not fit, or the prompts and their continuations do
      not fit the cache.
  """
  how = Settings(max_new_tokens, _one_sampler(sampler, temperature), seed)
  tokens = _as_rows(tokens)
  if attention_mask is not None:
    if lengths is not None:
      raise UserError("give lengths or attention_mask, not both")
    tokens, lengths = to_right_padded(tokens, np.asarray(attention_mask))
  prompts, lengths = checked_prompts(model, tokens, lengths)
  how.sampler.check(model.config.vocab_size)
  samples, slots = checked("samples", samples, Count), checked("slots", slots, Count)
  needed = _slots_for(int(lengths.max()), how.max_new_tokens)
  capacity = capacity_for(max(needed, tokens.shape[1])) if cache_length is None else cache_length
  if needed > capacity or tokens.shape[1] > capacity:
    raise UserError(
      f"prompts of up to {int(lengths.max())} tokens (rows of {tokens.shape[1]}) with {how.max_new_tokens} new ones do "
      f"not fit a cache of {capacity} slots; {max(needed, tokens.shape[1])} are needed"
    )
  check_room(min(len(tokens) * samples, slots), capacity, mesh_of(params), model)
  if len(prompts) * samples > slots:
    batcher = Batcher(model, params, Serving(slots=slots, capacity=capacity), sampler=how.sampler, prefix=prefix)
    drawn = _continuous(batcher, [row for row in prompts for _ in range(samples)], how)
  else:
    batch = Prompts.of(prompts, pad_to(tokens.shape[1], capacity), how.max_new_tokens, how.seed)
    prefixes = None if prefix is None else prefix.match(batch, model)
    layers = as_layers(params, model.plan)
    engine = Engine.of(model, layers)
    state = engine.prefill(layers, batch, sampler=how.sampler, capacity=capacity, prefixes=prefixes, samples=samples)
    drawn = _static(engine, layers, state, how)
  return Generated.of(model, drawn)


def _one_sampler(sampler: Sampler | None, temperature: float) -> Sampler:
  """The sampler, or one with the temperature given instead."""
  if sampler is None:
    return Sampler(temperature)
  if temperature:
    raise UserError("give a sampler or a temperature, not both: a sampler has its own temperature")
  return sampler


def _as_rows(tokens: ArrayLike) -> np.ndarray:
  try:
    return np.asarray(tokens)
  except ValueError:
    raise UserError("prompts must have one length: right-pad shorter ones, and give lengths") from None


def checked_prompts(
  model: Transformer, tokens: ArrayLike, lengths: ArrayLike | None
) -> tuple[list[np.ndarray], np.ndarray]:
  """The rows of a right-padded batch, each without its padding, and their lengths.

  Raises:
    UserError: if rows differ in length; also see `check_tokens`.
  """
  tokens = _as_rows(tokens)
  if tokens.ndim == 2 and lengths is None:
    lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32)
  lengths = np.asarray(lengths)
  check_tokens(tokens, lengths, model.config.vocab_size)
  return [row[:length] for row, length in zip(tokens, lengths, strict=True)], lengths


def pad_token(model: Transformer) -> int:
  """The token that fills rows after their end: the config's padding token, else its end token, else 0."""
  config = model.config
  return config.pad_token_id if config.pad_token_id is not None else (*config.eos_token_ids, 0)[0]


@same_call_on_all
def stream(
  model: Transformer,
  params: Params,
  prompt: ArrayLike,
  how: Settings = Settings(),
  chunk: int = 8,
) -> Iterator[list[int]]:
  """Continues one prompt and yields new tokens as they are generated; together they equal `generate` for that prompt.

  Args:
    model: from `from_pretrained`.
    params: in either layout; see `generate`.
    prompt: int ``[T]``.
    how: how many tokens to generate, and how they are sampled.
    chunk: tokens generated on the device between two yields.

  Raises:
    UserError: as `generate`.
  """
  if not isinstance(how, Settings):
    raise UserError(f"how must be Settings, such as Settings(max_new_tokens=24), not {how!r}")
  prompt = flat_prompt(prompt)
  capacity = capacity_for(max(1, _slots_for(prompt.size, how.max_new_tokens)))
  batcher = Batcher(model, params, Serving(slots=1, capacity=capacity, chunk=chunk), sampler=how.sampler)
  request = batcher.submit(prompt, how.max_new_tokens, seed=how.seed)
  yield batcher.enter()[request]
  while batcher.busy:
    yield batcher.step()[request]


def _slots_for(prompt: int, new: int) -> int:
  """Cache slots of a row: its last token is returned but never cached."""
  return prompt + new - 1


def _static(engine: Engine, layers: Params, state: DecodeState, how: Settings) -> Drawn:
  """Decodes rows after their first tokens."""
  new = how.max_new_tokens
  width = pad_to(new - 1, state.cache.capacity)
  # Fetched before the state is donated.
  tokens, log_probs, lengths, nonfinite = fetch((state.tokens, state.log_probs, state.positions, state.nonfinite))
  drawn = newest(tokens, log_probs, how.sampler)
  if new > 1:
    state, rest = engine.decode(layers, state, sampler=how.sampler, steps=np.int32(new - 1), width=width)
    rest, nonfinite = fetch((rest, state.nonfinite))
    drawn = Drawn(*jax.tree.map(lambda one, more: np.concatenate([one, more[:, : new - 1]], axis=1), drawn, rest))
  warn_nonfinite(nonfinite, lengths.tolist(), range(len(lengths)))
  return drawn


def _continuous(batcher: Batcher, prompts: Sequence[np.ndarray], how: Settings) -> Drawn:
  """Continuous batching, for more rows than slots."""
  new = how.max_new_tokens
  requests = [batcher.submit(row, new, seed=how.seed, row=number) for number, row in enumerate(prompts)]
  batcher.run()
  rows = np.full((len(prompts), new), -1, np.int32)
  log_probs = np.zeros((len(prompts), new), np.float32)
  for row, values, request in zip(rows, log_probs, requests, strict=True):
    row[: len(request.tokens)] = request.tokens
    values[: len(request.log_probs)] = request.log_probs
  return Drawn(rows, log_probs if how.sampler.log_probs else None)
