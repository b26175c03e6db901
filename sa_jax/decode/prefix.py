"""A shared prompt prefix, prefilled once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sa_jax.decode.engine import CachedPrefixes, Engine, pad_to
from sa_jax.decode.state import Prompts
from sa_jax.distributed import check_given, is_multiprocess
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import program
from sa_jax.sharding import traced_on
from sa_jax.trees import Params


@program(static_argnames="engine")
def _read(engine: Engine, params: Params, tokens: jax.Array) -> Cache:
  with traced_on(engine.mesh, engine.rules):
    return apply(engine.model, params, Transformer.prefill, tokens, jnp.full(1, tokens.shape[1], jnp.int32))[1]


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCache:
  """A cached prefix for `sa_jax.generate` and `Batcher`: a system prompt, or a conversation so far.

  Each prompt reuses the tokens that it has in common with the prefix and prefills the rest; it need not start with the
  whole prefix.

  Attributes:
    tokens: int32 ``[P]``.
    cache: one row's cache of these tokens, valid only for the parameters that computed it.
    model: the model that computed it.
  """

  tokens: np.ndarray
  cache: Cache
  model: Transformer

  @classmethod
  def read(cls, model: Transformer, params: Params, tokens: ArrayLike) -> PromptCache:
    """Prefills tokens, int ``[P]``; parameters in either layout, as in `sa_jax.generate`.

    Raises:
      UserError: if they are not tokens of the model, or its attention depends on the row length, so that a prefix
        differs between rows of different lengths.
    """
    row = np.asarray(tokens)[None]
    check_tokens(row, None, model.config.vocab_size)
    if any(rope is not None and rope.depends_on_length for _, rope in model.config.kinds):
      raise UserError(
        "the model's rotary embedding depends on a row's length, so a cached prefix cannot be reused in longer rows: "
        "give whole prompts, without a prefix"
      )
    if is_multiprocess(params):
      check_given("PromptCache.read", {"model": model, "tokens": row})
    layers = as_layers(params, model.plan)
    return cls(row[0].astype(np.int32), _read(Engine.of(model, layers), layers, row.astype(np.int32)), model)

  def match(self, prompts: Prompts, model: Transformer) -> CachedPrefixes:
    """The part of each prompt that is already cached; at least its last token is not.

    Raises:
      UserError: see `check`.
    """
    self.check(model)
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    width = min(tokens.shape[1], len(self.tokens))
    same = np.cumprod(tokens[:, :width] == self.tokens[:width], axis=1).sum(axis=1)
    shared = np.minimum(same, lengths - 1).astype(np.int32)
    return CachedPrefixes(self.cache, shared, pad_to(int((lengths - shared).max()), tokens.shape[1]))

  def check(self, model: Transformer) -> None:
    """Checks that the prefix is valid for a model.

    Raises:
      UserError: if it was computed by another model, or under another plan.
    """
    if (self.model.config, self.model.plan) != (model.config, model.plan):
      raise UserError(
        f"the prompt cache is of a different model (plan {self.model.plan}) than this one (plan {model.plan}): "
        "compute it again with PromptCache.read"
      )
