"""One `attend`, and the choice of how to compute it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError
from sa_jax.ops import kernels
from sa_jax.ops.attention import blockwise, cudnn, flash, reference, splash
from sa_jax.ops.attention.spec import AttentionSpec

_LOG = logging.getLogger("sa_jax")


class Rows(NamedTuple):
  """What the rows of a call are like.

  Attributes:
    packed: whether they hold several documents, told apart by segments.
    split: whether a call has part of each row's queries, and all of its keys.
  """

  packed: bool = False
  split: bool = False


class Backend(NamedTuple):
  """A way to compute attention.

  Attributes:
    attend: the function; of q, k, v, lengths, spec, segments and offset.
    unsupported: from platform, q, spec and `Rows`, why it cannot compute the call, or None when it can.
    partitions: whether XLA can split it over a mesh; what it cannot split runs under `jax.shard_map`, as
      `sa_jax.nn.QueryKey` does.
  """

  attend: Callable[..., jax.Array]
  unsupported: Callable[[str, jax.Array, AttentionSpec, Rows], str | None]
  partitions: bool = True


def _cudnn_unsupported(platform: str, q: jax.Array, spec: AttentionSpec, rows: Rows = Rows()) -> str | None:
  if platform not in ("gpu", "cuda"):
    return f"it runs on NVIDIA GPUs, and this is {platform}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, and q is {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"it takes head dimensions that are multiples of 8 up to 128, and q has {q.shape[-1]}"
  if spec.softcap is not None:
    return f"it has no soft cap of scores, and this attention has one of {spec.softcap}"
  if rows.packed:
    return "it has no segments, and these rows hold several documents"
  return _SPLIT if rows.split else None


def _flash_unsupported(platform: str, q: jax.Array, spec: AttentionSpec, rows: Rows = Rows()) -> str | None:  # noqa: ARG001
  if platform not in ("gpu", "cuda"):
    return f"it runs on NVIDIA GPUs, and this is {platform}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, and q is {q.dtype}"
  if kernels.triton is None:
    return "it is written in Pallas Triton, which this version of JAX does not have"
  if q.shape[-1] not in (16, 32, 64, 128):
    return f"it takes head dimensions of 16, 32, 64 and 128, and q has {q.shape[-1]}"
  return None


def _splash_unsupported(platform: str, q: jax.Array, spec: AttentionSpec, rows: Rows = Rows()) -> str | None:  # noqa: ARG001
  if platform != "tpu":
    return f"it runs on TPUs, and this is {platform}"
  return _SPLIT if rows.split else None


_SPLIT = "its causal mask begins with the first key, and here rows are split over devices"


backends: dict[str, Backend] = {
  "cudnn": Backend(cudnn.attend, _cudnn_unsupported),
  "flash": Backend(flash.attend, _flash_unsupported, partitions=False),
  "splash": Backend(splash.attend, _splash_unsupported, partitions=False),
  "blockwise": Backend(blockwise.attend, lambda *_: None),
  "reference": Backend(reference.attend, lambda *_: None),
}
"""By name: the fused ones first, the fastest of those that a platform has before the others."""

# Up to this many keys the weights fit in cache and one softmax beats many small ones.
_SHORT = 1024


def choose_backend(
  name: str,
  q: jax.Array,
  k: jax.Array,
  platform: str | None = None,
  spec: AttentionSpec = AttentionSpec(),
  rows: Rows = Rows(),
) -> str:
  """The backend that `attend` will use for these arrays.

  Args:
    name: a backend, or ``auto`` for the fastest that supports the call.
    q: ``[B, T, N, H]`` (array or shape).
    k: ``[B, T, K, H]`` (array or shape).
    platform: ``cpu``, ``gpu`` or ``tpu``; when None, the ambient mesh's (`jax.set_mesh`) or else the default backend's.
    spec: window, soft cap and scale.
    rows: whether they are packed or split.

  Raises:
    UserError: if there is no backend of that name, or it cannot compute this call (the reason is given).
  """
  platform = platform or kernels.platform()
  if name == "auto":
    fused = next(name for name, backend in backends.items() if backend.unsupported(platform, q, spec, rows) is None)
    chosen = "reference" if fused == "blockwise" and k.shape[1] <= _SHORT else fused
    _LOG.debug("attention of q %s, k %s, %s on %s: %s", q.shape, k.shape, q.dtype, platform, chosen)
    return chosen
  if name not in backends:
    raise UserError(f"no attention backend {name!r}; there are auto, {', '.join(backends)}")
  if reason := backends[name].unsupported(platform, q, spec, rows):
    raise UserError(f"the attention backend {name!r} cannot compute this: {reason}; 'auto' chooses one that can")
  return name


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  lengths: jax.Array | None = None,
  segments: jax.Array | None = None,
  offset: jax.Array | None = None,
  backend: str = "auto",
  spec: AttentionSpec = AttentionSpec(),
) -> jax.Array:
  """Causal attention ``softmax(q kᵀ / sqrt(H) + mask) v`` over whole sequences.

  Query ``t`` sees keys 0 to ``t``, of a right-padded row only those before its length, of a packed row only those of
  its document. With q and k of an anchor layer
  and v of a follower, this is the follower's attention (Liao & Vargas, arXiv 2407.12866).

  Args:
    q: ``[B, T, N, H]``.
    k: ``[B, S, K, H]``, N a multiple of K; S is T unless there is an offset.
    v: ``[B, S, K, H]``.
    lengths: int32 ``[B]``, or None when rows are full. Outputs at or past a row's length are finite and meaningless.
    segments: int32 ``[B, S]``, the document of each slot of packed rows; None when a row is one document.
    offset: int32 ``[]``, the slot of the first query among the keys, where q is part of a row; 0 when None.
    backend: ``auto``, ``reference`` (O(T²) memory), ``blockwise`` (O(T) memory, any device), ``cudnn``, ``flash``
      (NVIDIA) or ``splash`` (TPU). On a mesh, call ``flash`` and ``splash`` under `jax.shard_map`.
    spec: window, soft cap and scale.

  Returns:
    ``[B, T, N, H]`` in v's dtype.

  Raises:
    UserError: if shapes do not fit, or the named backend does not exist or cannot compute the call.
  """
  batch, length, heads, head_dim = q.shape
  keys = length if offset is None else k.shape[1]
  if k.shape != v.shape or k.shape[:2] != (batch, keys) or k.shape[3] != head_dim or heads % k.shape[2]:
    raise UserError(
      f"attend takes q [B, T, N, H] and k, v [B, T, K, H] with N a multiple of K, not {q.shape}, {k.shape}, {v.shape}"
    )
  if segments is not None and segments.shape != (batch, keys):
    raise UserError(f"segments are one number a slot, {(batch, keys)}, not {segments.shape}")
  rows = Rows(packed=segments is not None, split=offset is not None)
  chosen = choose_backend(backend, q, k, spec=spec, rows=rows)
  return backends[chosen].attend(q, k, v, lengths, spec, segments, offset)
