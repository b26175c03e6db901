"""`generate`: prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.decode.engine import decode, prefill
from sa_jax.decode.padding import to_right_padded
from sa_jax.decode.sampling import Sampler
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers


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
  params: Mapping[str, Any],
  tokens: Any,
  lengths: Any = None,
  max_new_tokens: int = 24,
  temperature: float = 0.0,
  seed: int = 0,
  *,
  top_k: int | None = None,
  top_p: float | None = None,
  attention_mask: Any = None,
  cache_length: int | None = None,
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
    cache_length: slots a row of the cache; just enough when None.

  Raises:
    ValueError: if a token is not in the vocabulary, a length does not fit, or the prompts and their continuations do
      not fit the cache.
  """
  sampler = Sampler(temperature, top_k, top_p)
  tokens = np.asarray(tokens)
  if attention_mask is not None:
    if lengths is not None:
      raise ValueError("give lengths or attention_mask, not both")
    tokens, lengths = to_right_padded(tokens, attention_mask)
  if tokens.ndim == 2 and lengths is None:
    lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32)
  lengths = np.asarray(lengths)
  check_tokens(tokens, lengths, model.config.vocab_size)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
  # The last token of a row is returned and never cached.
  needed = int(lengths.max()) + max_new_tokens - 1
  capacity = max(needed, tokens.shape[1]) if cache_length is None else cache_length
  if needed > capacity or tokens.shape[1] > capacity:
    raise ValueError(
      f"prompts of up to {int(lengths.max())} tokens (rows of {tokens.shape[1]}) with {max_new_tokens} new ones do not "
      f"fit a cache of {capacity} slots; {max(needed, tokens.shape[1])} are needed"
    )
  layers = as_layers(params, model.plan)
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(tokens)))
  state = prefill(
    model, sampler, capacity, layers, jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), keys
  )
  first = np.asarray(state.tokens)[:, None]
  _, rest = decode(model, sampler, max_new_tokens - 1, layers, state)
  out = np.concatenate([first, np.asarray(rest)], axis=1)
  config = model.config
  pad = config.pad_token_id if config.pad_token_id is not None else (*config.eos_token_ids, 0)[0]
  return Generated(np.where(out < 0, pad, out).astype(np.int32), (out >= 0).sum(axis=1).astype(np.int32))
