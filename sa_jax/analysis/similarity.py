"""How alike the attention weights of a model's layers are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sa_jax.nn import Transformer
from sa_jax.params import as_layers


@functools.partial(jax.jit, static_argnames="model")
def _cosine(model: Transformer, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
  states = model.apply({"params": params}, tokens, method="states")
  maps = jnp.stack([state.weights().astype(jnp.float32) for state in states])
  layers, batch, heads = maps.shape[:3]
  maps = maps.reshape(layers, batch * heads, -1)
  maps = maps / jnp.linalg.norm(maps, axis=-1, keepdims=True)
  return jnp.einsum("LRX,MRX->LM", maps, maps) / (batch * heads)


def layer_similarity(model: Transformer, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
  """Cosine similarity of every pair of layers' attention weights (Liao & Vargas, arXiv 2407.12866, section 3).

  Two heads of the same number are compared as vectors of all their weights, and the cosines averaged over heads and
  rows. Takes O(L N T²) memory. The weights on the first token, an attention sink, raise every value.

  Args:
    model: dense, or the followers equal their anchors.
    params: in either layout.
    tokens: int32 ``[B, T]``, full rows.

  Returns:
    float32 ``[L, L]``, symmetric, ones on the diagonal.
  """
  return _cosine(model, as_layers(params, model.plan), tokens)
