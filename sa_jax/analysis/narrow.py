"""Narrow values: keep only the directions of a head's values that the output needs most.

For each KV head, ``G`` is the sum of the second moments ``Oᵀ O`` of its query heads' outputs, and ``U`` the first r
left singular vectors of ``G^½ [W_O of its query heads]``. Values ``v`` become ``v G^-½ U``, and W_O ``Uᵀ G^½ W_O``. Of
all rank-r choices per head this changes the heads' contribution to the residual stream least, each query head taken
separately and assuming equal second moments. Then W_O is solved again, all heads together. The solve uses an
orthonormal basis of those directions, in which a ridge means the same as for full-width values.

Arrays keep their width, with zeros after the first r entries: the rank is data, and one program serves every rank.
`cut` removes the zeros at the end.
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
"""Lower bound of second moments, relative to the largest."""


class Directions(NamedTuple):
  """The kept directions of a layer's values, per KV head.

  Attributes:
    down: float32 ``[K, H, H]``, from values to coordinates: orthonormal columns, zero beyond the rank.
    up: float32 ``[K, H, H]``, from coordinates to values.
  """

  down: jax.Array
  up: jax.Array


@program(static_argnames="kv_heads")
def directions(gram: jax.Array, kernel: jax.Array, kv_heads: int, rank: jax.Array | int) -> Directions:
  """The directions of values that a layer's output needs most.

  Args:
    gram: ``[N H, N H]``, the second moments of the layer's head outputs.
    kernel: W_O, ``[N, H, D]``.
    kv_heads: ``K``.
    rank: number of directions to keep.
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
  # left singular vectors, largest first
  left = jnp.linalg.eigh(product("KGHD,KGZD->KHZ", needed, needed))[1][:, :, ::-1]
  kept = jax.lax.broadcasted_iota(jnp.int32, left.shape, 2) < rank
  left = jnp.where(kept, left, 0.0)
  basis, triangle = jnp.linalg.qr(product("KHZ,KZR->KHR", half(1 / roots), left))
  basis = jnp.where(kept, basis, 0.0)
  return Directions(basis, product("KRZ,KYZ,KYH->KRH", triangle, left, half(roots)))


@program()
def along(sums: Sums, kept: Directions) -> Sums:
  """Sums over head outputs projected onto the kept directions."""
  kv_heads, width, _ = kept.down.shape
  down = jnp.repeat(kept.down, sums.gram.shape[0] // width // kv_heads, axis=0)
  count = down.shape[0]
  gram = product("NHMZ,NHR,MZS->NRMS", sums.gram.reshape(count, width, count, width), down, down)
  cross = product("NHD,NHR->NRD", sums.cross.reshape(count, width, -1), down)
  return Sums(gram.reshape(sums.gram.shape), cross.reshape(sums.cross.shape), sums.energy)


def narrowed(block: Block, sums: Sums, kv_heads: int, rank: int) -> tuple[Block, Sums]:
  """A layer whose values are projected onto the directions that it needs most.

  Args:
    block: the layer's parameters.
    sums: sums of its head outputs ``[N H]`` with W_O's targets.
    kv_heads: ``K``.
    rank: number of directions to keep.

  Returns:
    The parameters, with new value projection (including bias) and W_O, and the sums for the new W_O's inputs.
  """
  kept = directions(sums.gram, block["attention"]["o_proj"]["kernel"], kv_heads, rank)
  return _changed(block, lambda values, kernel: _narrowed(values, kernel, kept)), along(sums, kept)


def cut(params: Params, value_dim: int) -> Params:
  """Parameters in the layer layout without the zeros of narrow values."""
  of = lambda block: _changed(block, lambda values, kernel: _cut(values, kernel, value_dim))
  return dict(params) | {"layers": {layer: of(block) for layer, block in params["layers"].items()}}


Change = Callable[[Params, jax.Array], tuple[Params, jax.Array]]
"""Maps the value projection's parameters and W_O to new ones."""


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
