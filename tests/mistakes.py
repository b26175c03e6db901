"""Mistakes that mypy has to find. An error that is expected here and does not come is an error itself.

A method is named through its class: Flax lets a module have any attribute, as far as types go.
"""

import jax

from sa_jax import ModelConfig, Transformer
from sa_jax.analysis import walk
from sa_jax.nn import PlannedBlock
from sa_jax.nn.typed import apply
from sa_jax.trees import Params


def misspelt_method(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
  return apply(model, params, Transformer.hiden, tokens)  # type: ignore[attr-defined]


def missing_argument(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
  return apply(model, params, Transformer.prefill, tokens)[0]  # type: ignore[call-arg]


def wrong_result(model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
  return apply(model, params, Transformer.prefill, tokens, lengths)  # type: ignore[return-value]


def method_of_another_module(model: Transformer, params: Params, x: jax.Array) -> jax.Array:
  return apply(model, params, PlannedBlock.add_mlp, x)  # type: ignore[misc]


def misspelt_piece_of_a_block(config: ModelConfig, block: Params, x: jax.Array) -> jax.Array:
  return walk.call(config, block, PlannedBlock.mlp_hiden, x)  # type: ignore[attr-defined]
