"""Narrow values: a head's values in its few most needed directions.

Of a key head, ``G`` is the sum of its query heads' second moments ``Oᵀ O`` (of what they output), and ``U`` the first r
left singular vectors of ``G^½ [W_O of its query heads]``. Values ``v`` become ``v G^-½ U``, W_O ``Uᵀ G^½ W_O``: of all
choices of r numbers a head those with which what the heads add to the residual stream changes least, each query head by
itself, were their second moments alike. Then W_O is solved again, all heads together. The numbers are taken along an
orthonormal basis of those directions, in which a ridge means what it means of whole values.

Everything here is as wide as before, with zeros behind the first r numbers: the rank is data, and one program serves
every rank. `cut` takes the zeros away at last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.analysis.ridge import Sums, product
from sa_jax.analysis.walk import Block
from sa_jax.programs import program
from sa_jax.sharding import placed_like
from sa_jax.trees import Params

_SMALLEST = 1e-6
"""Of the greatest second moment: directions with less are treated as if they had so much."""


class Directions(NamedTuple):
  """Which directions of a layer's values are kept, by key head.

  Attributes:
    down: float32 ``[K, H, H]``, from values to their numbers: orthonormal columns, and zeros behind the rank.
    up: float32 ``[K, H, H]``, back.
  """

  down: jax.Array
  up: jax.Array


@program(static_argnames="kv_heads")
def directions(gram: jax.Array, kernel: jax.Array, kv_heads: int, rank: jax.Array | int) -> Directions:
  """The directions of values that a layer's output needs most.

  Args:
    gram: ``[N H, N H]``, the second moments of its head outputs.
    kernel: W_O, ``[N, H, D]``.
    kv_heads: ``K``.
    rank: how many directions are kept.
  """
  heads, width, embed = kernel.shape
  size = heads // kv_heads
  blocks = gram.reshape(kv_heads, size, width, kv_heads, size, width)
  own = product("KGHKGZ->KHZ", blocks)
  moments, axes = jnp.linalg.eigh(own)
  floor = jnp.maximum(moments[:, -1:] * _SMALLEST, jnp.finfo(jnp.float32).tiny)
  roots = jnp.sqrt(jnp.maximum(moments, floor))
  half = lambda scale: product("KHZ,KZ,KYZ->KHY", axes, scale, axes)
  weights = kernel.astype(jnp.float32).reshape(kv_heads, size, width, embed)
  needed = product("KHZ,KGZD->KGHD", half(roots), weights)
  # The left singular vectors, the greatest first.
  left = jnp.linalg.eigh(product("KGHD,KGZD->KHZ", needed, needed))[1][:, :, ::-1]
  kept = jax.lax.broadcasted_iota(jnp.int32, left.shape, 2) < rank
  left = jnp.where(kept, left, 0.0)
  basis, triangle = jnp.linalg.qr(product("KHZ,KZR->KHR", half(1 / roots), left))
  basis = jnp.where(kept, basis, 0.0)
  return Directions(basis, product("KRZ,KYZ,KYH->KRH", triangle, left, half(roots)))


@program()
def along(sums: Sums, kept: Directions) -> Sums:
  """The sums of head outputs' numbers along the directions, of those of head outputs."""
  kv_heads, width, _ = kept.down.shape
  down = jnp.repeat(kept.down, sums.gram.shape[0] // width // kv_heads, axis=0)
  count = down.shape[0]
  gram = product("NHMZ,NHR,MZS->NRMS", sums.gram.reshape(count, width, count, width), down, down)
  cross = product("NHD,NHR->NRD", sums.cross.reshape(count, width, -1), down)
  return Sums(gram.reshape(sums.gram.shape), cross.reshape(sums.cross.shape), sums.energy)


def narrowed(block: Block, sums: Sums, kv_heads: int, rank: int) -> tuple[Block, Sums]:
  """A layer with values along the directions that it needs most.

  Args:
    block: its parameters.
    sums: of its head outputs ``[N H]`` with what W_O should make of them.
    kv_heads: ``K``.
    rank: how many directions are kept.

  Returns:
    The parameters, the value projection's bias and the W_O that reads them included, and the sums of what that reads.
  """
  kept = directions(sums.gram, block["attention"]["o_proj"]["kernel"], kv_heads, rank)
  return _changed(block, lambda values, kernel: _narrowed(values, kernel, kept)), along(sums, kept)


def cut(params: Params, value_dim: int) -> Params:
  """Parameters in the layer layout without the zeros behind the first numbers of values."""
  of = lambda block: _changed(block, lambda values, kernel: _cut(values, kernel, value_dim))
  return dict(params) | {"layers": {layer: of(block) for layer, block in params["layers"].items()}}


Change = Callable[[Params, jax.Array], tuple[Params, jax.Array]]
"""From the value projection's parameters and W_O to others."""


def _changed(block: Block, change: Change) -> Block:
  attention = block["attention"]
  values, kernel = change(dict(attention["v_proj"]), attention["o_proj"]["kernel"])
  output = dict(attention["o_proj"]) | {"kernel": placed_like(kernel, attention["o_proj"]["kernel"])}
  values = {name: placed_like(leaf, attention["v_proj"][name]) for name, leaf in values.items()}
  return dict(block) | {"attention": dict(attention) | {"v_proj": values, "o_proj": output}}


@program()
def _narrowed(values: Params, kernel: jax.Array, kept: Directions) -> tuple[Params, jax.Array]:
  fewer = lambda leaf: product("...KH,KHR->...KR", leaf.astype(jnp.float32), kept.down).astype(leaf.dtype)
  up = jnp.repeat(kept.up, kernel.shape[0] // kept.up.shape[0], axis=0)
  read = product("NRH,NHD->NRD", up, kernel.astype(jnp.float32)).astype(kernel.dtype)
  return {name: fewer(leaf) for name, leaf in values.items()}, read


@program(static_argnames="value_dim")
def _cut(values: Params, kernel: jax.Array, value_dim: int) -> tuple[Params, jax.Array]:
  return {name: leaf[..., :value_dim] for name, leaf in values.items()}, kernel[:, :value_dim]
