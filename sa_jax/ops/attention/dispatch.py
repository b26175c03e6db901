"""One `attend`, and the choice of how to compute it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError
from sa_jax.ops import kernels
from sa_jax.ops.attention import blockwise, chunked, cudnn, flash, hopper, reference, splash
from sa_jax.ops.attention.group import Parts
from sa_jax.ops.attention.rows import (
  BIAS,
  DEMANDS,
  MASK,
  NOT_CAUSAL,
  OFFSET,
  SEGMENTS,
  SINKS,
  Rows,
  described,
  is_array,
)
from sa_jax.ops.attention.spec import AttentionSpec

_LOG = logging.getLogger("sa_jax")


_MACHINES = {"gpu": "NVIDIA GPUs", "tpu": "TPUs", "cpu": "CPUs"}


class Backend(NamedTuple):
  """A way to compute attention.

  Attributes:
    attend: the function; of q, k, v, rows and spec.
    serves: which of `DEMANDS` it meets.
    platforms: those that it runs on; any when None.
    dtypes: those that it computes in; any when None.
    unsupported: from q and spec, why else it cannot compute the call, or None when it can.
    partitions: whether XLA can split it over a mesh; what it cannot split runs under `jax.shard_map`, as
      `sa_jax.nn.QueryKey` does.
    narrow: whether it takes values narrower than keys as they are; otherwise it gets them filled up with zeros.
    parts: what a group's one backward pass is made of; None where each layer has its own.
  """

  attend: Callable[[jax.Array, jax.Array, jax.Array, Rows, AttentionSpec], jax.Array]
  serves: frozenset[str] = frozenset()
  platforms: tuple[str, ...] | None = None
  dtypes: tuple[str, ...] | None = None
  unsupported: Callable[[jax.Array, AttentionSpec], str | None] = lambda *_: None
  partitions: bool = True
  narrow: bool = False
  parts: Parts | None = None

  def taking_narrow(self) -> Backend:
    """The backend that takes values of any width: itself, or one that fills them up with zeros."""
    if self.narrow:
      return self

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> jax.Array:
      width, missing = v.shape[3], k.shape[3] - v.shape[3]
      filled = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else v
      return self.attend(q, k, filled, rows, spec)[..., :width]

    return self._replace(attend=attend, narrow=True)

  def refusal(self, platform: str, q: jax.Array, rows: Rows, spec: AttentionSpec) -> str | None:
    """Why it cannot compute the call, or None when it can."""
    if self.platforms is not None and platform not in self.platforms:
      return f"it runs on {_MACHINES.get(self.platforms[0], self.platforms[0])}, and this is {platform}"
    if self.dtypes is not None and str(q.dtype) not in self.dtypes:
      return f"it computes in {' or '.join(self.dtypes)}, and q is {q.dtype}"
    if reason := self.unsupported(q, spec):
      return reason
    lacking = [demand for demand in rows.demands if demand not in self.serves]
    return f"it has no {' and no '.join(lacking)}, which these rows need" if lacking else None


def _cudnn_unsupported(q: jax.Array, spec: AttentionSpec) -> str | None:
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"it takes head dimensions that are multiples of 8 up to 128, and q has {q.shape[-1]}"
  if spec.softcap is not None:
    return f"it has no soft cap of scores, and this attention has one of {spec.softcap}"
  return None


def _flash_unsupported(q: jax.Array, spec: AttentionSpec) -> str | None:  # noqa: ARG001
  if kernels.triton is None:
    return "it is written in Pallas Triton, which this version of JAX does not have"
  if q.shape[-1] not in (16, 32, 64, 128):
    return f"it takes head dimensions of 16, 32, 64 and 128, and q has {q.shape[-1]}"
  return None


_GPU, _HALF = ("gpu", "cuda"), ("bfloat16", "float16")
_ALL, _OF_FLASH = frozenset(DEMANDS), frozenset({SEGMENTS, OFFSET, SINKS})
_OF_BLOCKWISE = _OF_FLASH | {NOT_CAUSAL}
_PARTS_OF_BLOCKWISE = Parts(
  blockwise.forward,
  blockwise.d_values,
  blockwise.d_query_key,
  takes=lambda q, rows, spec: set(rows.demands) <= _OF_BLOCKWISE - {SINKS},
)

backends: dict[str, Backend] = {
  name: backend.taking_narrow()
  for name, backend in {
    "cudnn": Backend(
      cudnn.attend, frozenset({BIAS, MASK, NOT_CAUSAL}), _GPU, _HALF, _cudnn_unsupported, parts=hopper.PARTS
    ),
    "flash": Backend(flash.attend, _OF_FLASH, _GPU, _HALF, _flash_unsupported, partitions=False),
    "splash": Backend(splash.attend, frozenset({SEGMENTS, SINKS}), ("tpu",), partitions=False),
    "blockwise": Backend(blockwise.attend, _OF_BLOCKWISE, narrow=True, parts=_PARTS_OF_BLOCKWISE),
    "reference": Backend(reference.attend, _ALL, narrow=True),
    "chunked": Backend(chunked.attend, _ALL, narrow=True),
  }.items()
}
"""By name: the fused ones first, the fastest of those that a platform has before the others."""

# Up to this many keys the weights fit in cache and one softmax beats many small ones.
_SHORT = 1024


def choose_backend(
  name: str,
  q: jax.Array,
  k: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  platform: str | None = None,
) -> str:
  """The backend that `attend` will use for these arrays.

  Args:
    name: a backend, or ``auto`` for the fastest that supports the call.
    q: ``[B, T, N, H]`` (array or shape).
    k: ``[B, S, K, H]`` (array or shape).
    rows: which keys the queries may see (arrays or shapes).
    spec: window, soft cap and scale.
    platform: ``cpu``, ``gpu`` or ``tpu``; when None, the ambient mesh's (`jax.set_mesh`) or else the default backend's.

  Raises:
    UserError: if there is no backend of that name, or it cannot compute this call (the reason is given).
  """
  platform = platform or kernels.platform()
  able = [each for each, backend in backends.items() if backend.refusal(platform, q, rows, spec) is None]
  if name == "auto":
    # A length that `jax.export` leaves open cannot be cut into blocks.
    short = not isinstance(k.shape[1], int) or k.shape[1] <= _SHORT
    chosen = "reference" if able[0] == "blockwise" and short else able[0]
    _LOG.debug("attention of q %s, k %s, %s on %s: %s", q.shape, k.shape, q.dtype, platform, chosen)
    return chosen
  if name not in backends:
    raise UserError(f"no attention backend {name!r}; there are auto, {', '.join(backends)}")
  if reason := backends[name].refusal(platform, q, rows, spec):
    raise UserError(f"the attention backend {name!r} cannot compute this: {reason}; use {', '.join(able)}, or 'auto'")
  return name


def register_backend(name: str, backend: Backend) -> None:
  """Adds a way to compute attention, which configs and calls may then name; ``auto`` does not choose it.

  It computes whole rows, prompts too. New tokens against a cache are computed by the library's own decode attention.

  Args:
    name: not one of those that there are.
    backend: what it computes and for which calls.

  Raises:
    UserError: if the name is taken, it is no `Backend`, or it serves what nothing demands.
  """
  if name in ("auto", *backends):
    raise UserError(f"there is an attention backend {name!r} already; choose another name")
  if not isinstance(backend, Backend):
    raise UserError(f"a backend is a Backend, such as Backend(attend), not {backend!r}")
  if unknown := sorted(set(backend.serves) - set(DEMANDS)):
    raise UserError(f"unknown demands {', '.join(map(repr, unknown))}; DEMANDS are {', '.join(map(repr, DEMANDS))}")
  backends[name] = backend.taking_narrow()


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  backend: str = "auto",
) -> jax.Array:
  """Attention ``softmax(q kᵀ / sqrt(H) + bias, where seen) v``, causal unless the rows say otherwise.

  With q and k of an anchor layer and v of a follower, this is the follower's attention (Liao & Vargas, arXiv
  2407.12866).

  Args:
    q: ``[B, T, N, H]``.
    k: ``[B, S, K, H]``, N a multiple of K; S is T unless the rows have an offset or are not causal.
    v: ``[B, S, K, R]``, R at most H.
    rows: which keys the queries may see. Outputs at or past a row's length are finite and meaningless.
    spec: window, soft cap and scale.
    backend: ``auto``, ``reference`` (O(T S) memory), ``blockwise`` (O(T) memory, any device), ``cudnn``, ``flash``
      (NVIDIA), ``splash`` (TPU), ``chunked``, or one of `register_backend`. On a mesh, call ``flash`` and ``splash``
      under `jax.shard_map`. Derivatives of every order and mode are those of ``reference``, and in long rows of
      ``chunked``; the others have a gradient of their own, without a forward mode (`jax.jvp`).

  Returns:
    ``[B, T, N, R]`` in v's dtype.

  Raises:
    UserError: if arrays do not fit, or the named backend does not exist or cannot compute the call.
  """
  check_shapes(q, k, v, rows)
  return backends[choose_backend(backend, q, k, rows, spec)].attend(q, k, v, rows, spec)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> None:
  """Checks what `attend` is given.

  Raises:
    UserError: if the arrays do not fit each other, with every fault.
  """
  if any(not is_array(x, jnp.floating) or len(x.shape) != 4 for x in (q, k, v)) or (
    k.shape[:3] != v.shape[:3]
    or k.shape[3] < v.shape[3]
    or k.shape[0] != q.shape[0]
    or k.shape[3] != q.shape[3]
    or q.shape[2] % k.shape[2]
  ):
    found = ", ".join(map(described, (q, k, v)))
    raise UserError(
      f"attend takes q [B, T, N, H], k [B, S, K, H] and v [B, S, K, R], N a multiple of K and R at most H; not {found}"
    )
  (batch, queries, heads), keys = q.shape[:3], k.shape[1]
  faults = []
  if queries != keys and rows.causal and rows.offset is None:
    faults.append(
      f"{queries} queries cannot see {keys} keys causally: give the slot of the first query among the keys, "
      "rows.offset, or rows.causal=False"
    )
  faults += rows.faults(batch, heads, queries, keys)
  if faults:
    raise UserError.of("attend", faults)
