"""Reference attention over chunks of queries, in O(S) memory.

It uses ordinary JAX operations only, so forward-mode, reverse-mode and nested derivatives all work. The backward pass
recomputes the weights of each chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sa_jax.ops.attention import reference
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.spec import AttentionSpec

_CHUNK = 256


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec, chunk: int = _CHUNK) -> jax.Array:
  """Attention by chunks of ``chunk`` queries. Shapes as in `sa_jax.ops.attend`."""
  length = q.shape[1]
  if length <= chunk:
    return reference.attend(q, k, v, rows, spec)
  start = jnp.int32(0) if rows.offset is None else rows.offset

  @jax.checkpoint
  def some(part: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]) -> jax.Array:
    at, queries, bias, mask = part
    visible = dataclasses.replace(rows, offset=start + at, bias=bias, mask=mask)
    return reference.attend(queries, k, v, visible, spec)

  split = lambda x, axis: None if x is None else _chunks(x, axis, chunk)
  places = jnp.arange(0, length, chunk)
  out = jax.lax.map(some, (places, split(q, 1), split(rows.bias, 2), split(rows.mask, 2)))
  return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, q.shape[2], v.shape[3])[:, :length]


def _chunks(x: jax.Array, axis: int, chunk: int) -> jax.Array:
  """Pads an axis to whole chunks, and splits it into a new first axis of chunks."""
  room = [(0, -x.shape[axis] % chunk if each == axis else 0) for each in range(x.ndim)]
  padded = jnp.pad(x, room)
  shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(padded.reshape(shape), axis, 0)
