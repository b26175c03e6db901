"""`attend`, and the choice of its backend."""

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
  """An implementation of attention and the calls that it supports.

  Attributes:
    attend: a function of (q, k, v, rows, spec), with the shapes of `sa_jax.ops.attend`.
    serves: the `DEMANDS` that it supports.
    platforms: JAX platforms that it runs on; None for all.
    dtypes: names of the dtypes that it computes in; None for all.
    unsupported: a function of (q, spec): any other reason why it cannot compute the call, or None.
    partitions: whether XLA can partition it over a mesh. If not, it must be called under `jax.shard_map`, as
      `sa_jax.nn.QueryKey` does.
    narrow: whether it accepts values narrower than keys (R < H). If not, values are zero-padded to H.
    parts: the building blocks of a group's shared backward pass; None if each layer needs its own.
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
    """A backend that accepts values of any width up to H: itself, or a wrapper that zero-pads them."""
    if self.narrow:
      return self

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> jax.Array:
      width, missing = v.shape[3], k.shape[3] - v.shape[3]
      filled = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else v
      return self.attend(q, k, filled, rows, spec)[..., :width]

    return self._replace(attend=attend, narrow=True)

  def refusal(self, platform: str, q: jax.Array, rows: Rows, spec: AttentionSpec) -> str | None:
    """The reason why it cannot compute the call, or None if it can.

    Args:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      q: ``[B, T, N, H]`` (array or shape).
      rows: which keys the queries may see (arrays or shapes).
      spec: window, soft cap and scale.
    """
    if self.platforms is not None and platform not in self.platforms:
      return f"it runs on {_MACHINES.get(self.platforms[0], self.platforms[0])}, but this is {platform}"
    if self.dtypes is not None and str(q.dtype) not in self.dtypes:
      return f"it needs {' or '.join(self.dtypes)}, but q is {q.dtype}"
    if reason := self.unsupported(q, spec):
      return reason
    lacking = [demand for demand in rows.demands if demand not in self.serves]
    return f"it does not support {' or '.join(lacking)}" if lacking else None


def _cudnn_unsupported(q: jax.Array, spec: AttentionSpec) -> str | None:
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"it needs a head dimension that is a multiple of 8 up to 128, but q has {q.shape[-1]}"
  if spec.softcap is not None:
    return f"it does not support a soft cap, but this attention has one of {spec.softcap}"
  return None


def _flash_unsupported(q: jax.Array, spec: AttentionSpec) -> str | None:  # noqa: ARG001
  if kernels.triton is None:
    return "it needs Pallas Triton, which this version of JAX does not have"
  if q.shape[-1] not in (16, 32, 64, 128):
    return f"it needs a head dimension of 16, 32, 64 or 128, but q has {q.shape[-1]}"
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
"""Backends by name, in the order in which ``auto`` tries them."""

# With at most this many keys, the weights fit in cache, and one softmax is faster than a loop over blocks.
_SHORT = 1024


def choose_backend(
  name: str,
  q: jax.Array,
  k: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  platform: str | None = None,
) -> str:
  """The backend that `attend` uses for these arrays.

  Args:
    name: a backend, or ``auto`` for the fastest built-in one that supports the call.
    q: ``[B, T, N, H]`` (array or shape).
    k: ``[B, S, K, H]`` (array or shape).
    rows: which keys the queries may see (arrays or shapes).
    spec: window, soft cap and scale.
    platform: ``cpu``, ``gpu`` or ``tpu``; None for that of the ambient mesh (`jax.set_mesh`), or else JAX's default.

  Returns:
    The backend's name, a key of `backends`.

  Raises:
    UserError: if there is no backend of that name, or it cannot compute this call (with the reason).
  """
  platform = platform or kernels.platform()
  able = [each for each, backend in backends.items() if backend.refusal(platform, q, rows, spec) is None]
  if name == "auto":
    # A symbolic length (`jax.export`) cannot be cut into blocks.
    short = not isinstance(k.shape[1], int) or k.shape[1] <= _SHORT
    chosen = "reference" if able[0] == "blockwise" and short else able[0]
    _LOG.debug("attention of q %s, k %s, %s on %s: %s", q.shape, k.shape, q.dtype, platform, chosen)
    return chosen
  if name not in backends:
    raise UserError(f"unknown attention backend {name!r}; choose from auto, {', '.join(backends)}")
  if reason := backends[name].refusal(platform, q, rows, spec):
    raise UserError(f"the attention backend {name!r} cannot compute this: {reason}; use {', '.join(able)}, or 'auto'")
  return name


def register_backend(name: str, backend: Backend) -> None:
  """Registers an attention backend, which configs and calls can then name. ``auto`` never chooses it.

  It is used for whole rows, including prompts. New tokens over a cache always use the library's decode attention.

  Args:
    name: an unused name.
    backend: the implementation and the calls that it supports.

  Raises:
    UserError: if the name is taken, ``backend`` is not a `Backend`, or ``backend.serves`` has an unknown demand.
  """
  if name in ("auto", *backends):
    raise UserError(f"the attention backend {name!r} already exists; choose another name")
  if not isinstance(backend, Backend):
    raise UserError(f"backend must be a Backend, such as Backend(attend), not {backend!r}")
  if unknown := sorted(set(backend.serves) - set(DEMANDS)):
    raise UserError(f"unknown demands {', '.join(map(repr, unknown))}; choose from {', '.join(map(repr, DEMANDS))}")
  backends[name] = backend.taking_narrow()


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  backend: str = "auto",
) -> jax.Array:
  """Multi-head or grouped-query attention, ``softmax(q kᵀ / sqrt(H) + bias) v`` over the visible keys.

  Causal unless ``rows.causal`` is False. Query head ``n`` uses key/value head ``n // (N / K)``. With an anchor's q and
  k and a follower's v, this is the follower's attention (Liao & Vargas, arXiv 2407.12866).

  Args:
    q: ``[B, T, N, H]``, floating-point.
    k: ``[B, S, K, H]``, where K divides N; S equals T unless the rows have an offset or are not causal.
    v: ``[B, S, K, R]``, R at most H.
    rows: which keys the queries may see. Outputs at or past a row's length are finite but meaningless.
    spec: window, soft cap and scale.
    backend: ``auto``, ``reference`` (O(T S) memory), ``blockwise`` (O(T) memory, any device), ``cudnn`` and ``flash``
      (NVIDIA), ``splash`` (TPU), ``chunked`` (O(S) memory), or a name from `register_backend`. On a mesh, call
      ``flash`` and ``splash`` under `jax.shard_map`. Only ``reference`` and ``chunked`` (for long rows) support
      forward mode (`jax.jvp`) and higher derivatives; the others define a custom gradient.

  Returns:
    ``[B, T, N, R]`` in v's dtype.

  Raises:
    UserError: if the arrays do not fit each other, or the named backend does not exist or cannot compute the call.
  """
  check_shapes(q, k, v, rows)
  return backends[choose_backend(backend, q, k, rows, spec)].attend(q, k, v, rows, spec)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> None:
  """Checks the arguments of `attend`.

  Raises:
    UserError: if the arrays do not fit each other; lists all errors.
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
      "attend takes q [B, T, N, H], k [B, S, K, H] and v [B, S, K, R], with N a multiple of K and R at most H; "
      f"not {found}"
    )
  (batch, queries, heads), keys = q.shape[:3], k.shape[1]
  faults = []
  if queries != keys and rows.causal and rows.offset is None:
    faults.append(
      f"{queries} queries cannot attend causally to {keys} keys: set rows.offset to the first query's slot, or "
      "rows.causal=False"
    )
  faults += rows.faults(batch, heads, queries, keys)
  if faults:
    raise UserError.of("attend", faults)
