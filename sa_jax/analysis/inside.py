"""Looking inside a model, and changing what is there: by layer number, in both parameter layouts.

A forward pass in the layer layout is watched where its blocks' named pieces begin and end; the run layout is taken
apart inside the program. Which layer and which heads an edit changes is data: one program serves a whole sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from sa_jax import ops
from sa_jax.distributed import called_alike
from sa_jax.errors import UserError
from sa_jax.nn import AnchorAttention, AttentionWeights, FollowerAttention, Mlp, Moe, Transformer
from sa_jax.nn.block import Block
from sa_jax.nn.state import State
from sa_jax.nn.transformer import check_tokens
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import program
from sa_jax.sharding import traced_where_parameters_are
from sa_jax.trees import Params, Tree

Site = Literal["residual", "weights", "values", "heads", "attention", "mlp"]
"""What can be looked at and changed in a layer:

* ``residual``: ``[B, T, D]``, what enters the layer; number ``L`` is what leaves the last one.
* ``weights``: ``[B, N, T, S]``, the attention weights that it uses; a follower's are its anchor's, as changed there.
* ``values``: ``[B, T, K, H]``.
* ``heads``: ``[B, T, N, H]``, the heads' outputs, which the output projection reads.
* ``attention``, ``mlp``: ``[B, T, D]``, what either gives, before any norm that a family has after it.
"""

Captured = Literal["residual", "weights", "values", "heads", "attention", "mlp", "states"]
"""The sites, and ``states``: the attention state that each layer uses."""

_TOKENS: dict[Site, int] = {"residual": 1, "weights": 2, "values": 1, "heads": 1, "attention": 1, "mlp": 1}
_HEADS: dict[Site, int] = {"weights": 1, "values": 2, "heads": 2}


@struct.dataclass
class Edit:
  """A change of one layer at a site: ``x`` becomes ``keep * x + value`` at some heads and positions.

  `ablate`, `patch` and `steer` make the usual ones.

  Attributes:
    site: where.
    layer: int32 ``[]``, in which layer.
    value: what broadcasts to the site's array.
    keep: how much of what is there stays.
    heads: int32 ``[h]``, which heads; all when None.
    positions: int32 ``[p]``, which tokens (of weights: which queries); all when None.
  """

  site: Site = struct.field(pytree_node=False)
  layer: Tree
  value: Tree
  keep: Tree = 0.0
  heads: Tree = None
  positions: Tree = None

  def __call__(self, layer: int, x: jax.Array) -> jax.Array:
    """A layer's array at the site, with the change if it is meant for this layer."""
    where = jnp.asarray(self.layer) == layer
    chosen = jnp.broadcast_to(where, x.shape)
    for numbers, axis in ((self.heads, _HEADS.get(self.site)), (self.positions, _TOKENS[self.site])):
      if numbers is not None and axis is not None:
        meant = (jnp.arange(x.shape[axis])[:, None] == jnp.asarray(numbers).reshape(1, -1)).any(axis=1)
        chosen &= jnp.broadcast_to(jnp.expand_dims(meant, [each for each in range(x.ndim) if each != axis]), x.shape)
    value = jnp.broadcast_to(jnp.asarray(self.value, jnp.float32), x.shape)
    kept = jnp.where(jnp.asarray(self.keep) == 0, 0.0, self.keep * x.astype(jnp.float32))  # of NaN too, nothing
    return jnp.where(chosen, (kept + value).astype(x.dtype), x)


def ablate(site: Site, layer: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None) -> Edit:
  """Sets a layer's array at a site to zero, at some heads and positions.

  Args:
    site: where.
    layer: int ``[]``, of which layer.
    heads: int ``[h]``, which heads; all when None.
    positions: int ``[p]``, which tokens (of weights: which queries); all when None.
  """
  return Edit(site, layer, 0.0, 0.0, heads, positions)


def patch(
  site: Site, layer: ArrayLike, value: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None
) -> Edit:
  """Sets a layer's array at a site to another one, such as what `look` has captured in another model or text.

  Args:
    site: where.
    layer: int ``[]``, of which layer.
    value: what broadcasts to the whole array of the site (see `Site`).
    heads: int ``[h]``, which heads; all when None.
    positions: int ``[p]``, which tokens (of weights: which queries); all when None.
  """
  return Edit(site, layer, value, 0.0, heads, positions)


def steer(
  site: Site, layer: ArrayLike, value: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None
) -> Edit:
  """Adds to a layer's array at a site.

  Args:
    site: where.
    layer: int ``[]``, of which layer.
    value: what is added; it broadcasts to the whole array of the site (see `Site`).
    heads: int ``[h]``, which heads; all when None.
    positions: int ``[p]``, which tokens (of weights: which queries); all when None.
  """
  return Edit(site, layer, value, 1.0, heads, positions)


class Looked(NamedTuple):
  """What `look` returns.

  Attributes:
    logits: float32 ``[B, T, V]``.
    seen: by what was captured, one entry a layer in the layers' order; of ``residual``, one more.
  """

  logits: jax.Array
  seen: dict[str, tuple[Tree, ...]]


@called_alike
def look(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  rows: ops.Rows = ops.Rows(),
  capture: Sequence[Captured] = (),
  edits: Sequence[Edit] = (),
) -> Looked:
  """A forward pass that is looked into, and changed.

  What is captured is as it was after the edits of its place.

  Args:
    model: with any plan.
    params: in either layout.
    tokens: int ``[B, T]``.
    rows: which tokens a token may see: lengths, documents, a bias, a mask.
    capture: what to return besides the logits.
    edits: what to change, in this order where several change the same place.

  Raises:
    UserError: if there is no such site, or an edit names a layer or a head that there is not.
  """
  tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  check_tokens(tokens, rows.lengths, model.config.vocab_size)
  if wrong := [name for name in capture if name not in get_args(Captured)]:
    raise UserError(f"look cannot capture {wrong}; it captures {', '.join(get_args(Captured))}")
  _check(edits, model)
  return _look(model, params, jnp.asarray(tokens), rows, tuple(edits), capture=tuple(dict.fromkeys(capture)))


def logit_lens(model: Transformer, params: Params, residuals: Sequence[jax.Array]) -> jax.Array:
  """What the model would say if it ended after each layer (nostalgebraist's logit lens).

  Args:
    model: whose last norm and head read them.
    params: in either layout.
    residuals: ``[B, T, D]`` each, such as ``look(…, capture=["residual"]).seen["residual"]``.

  Returns:
    float32 ``[len(residuals), B, T, V]``; the last of all residuals gives the model's own logits.
  """
  return _read(model, params, jnp.stack(list(residuals)))


@traced_where_parameters_are
def _read(model: Transformer, params: Params, residuals: jax.Array) -> jax.Array:
  return _read_all(model, nn.unbox(params), residuals)


@program(static_argnames="model")
def _read_all(model: Transformer, params: Params, residuals: jax.Array) -> jax.Array:
  return jax.lax.map(lambda x: apply(model, params, Transformer.read, x), residuals)


def _check(edits: Sequence[Edit], model: Transformer) -> None:
  layers, faults = model.config.num_layers, []
  for number, edit in enumerate(edits):
    if edit.site not in _TOKENS:
      faults.append(f"edit {number} is of {edit.site!r}; the sites are {', '.join(_TOKENS)}")
      continue
    last = layers if edit.site == "residual" else layers - 1
    heads = model.config.num_kv_heads if edit.site == "values" else model.config.num_heads
    if edit.heads is not None and edit.site not in _HEADS:
      faults.append(f"edit {number} names heads, and {edit.site!r} has none")
    for name, values, most in (("layer", edit.layer, last), ("heads", edit.heads, heads - 1)):
      known = values is not None and not isinstance(values, jax.core.Tracer)
      if known and not ((np.asarray(values) >= 0) & (np.asarray(values) <= most)).all():
        faults.append(f"edit {number} has {name} {np.asarray(values).tolist()}; there are 0 to {most}")
  if faults:
    raise UserError.of("look", faults)


@traced_where_parameters_are
def _look(
  model: Transformer, params: Params, tokens: jax.Array, rows: ops.Rows, edits: tuple[Edit, ...], capture: Tree
) -> Looked:
  return _look_inside(model, nn.unbox(params), tokens, rows, edits, capture=capture)


@program(static_argnames=("model", "capture"))
def _look_inside(
  model: Transformer, params: Params, tokens: jax.Array, rows: ops.Rows, edits: tuple[Edit, ...], *, capture: Tree
) -> Looked:
  watcher = _Watcher(model.config.num_layers, edits, capture)
  with nn.intercept_methods(watcher):
    logits = apply(model, as_layers(params, model.plan), Transformer.__call__, tokens, None, None, rows)
  return Looked(
    logits, {name: tuple(watcher.seen[name][layer] for layer in sorted(watcher.seen[name])) for name in capture}
  )


class _Watcher:
  """Stands between the blocks' pieces; see `flax.linen.intercept_methods`."""

  def __init__(self, layers: int, edits: tuple[Edit, ...], capture: tuple[str, ...]):
    self._layers, self._edits, self._capture = layers, edits, capture
    self.seen: dict[str, dict[int, Tree]] = {name: {} for name in capture}
    self._inside: set[tuple[tuple[str, ...], str]] = set()

  def __call__(
    self, call: Callable[..., Tree], args: Tree, kwargs: Tree, context: nn.module.InterceptorContext
  ) -> Tree:
    """A method's call, watched; that of the class above it, inside it, is a part of the same call."""
    module, method = context.module, context.method_name
    key = (module.path, method)
    if key in self._inside:
      return call(*args, **kwargs)
    self._inside.add(key)
    try:
      return self._watched(module, method, functools.partial(call, **kwargs), args)
    finally:
      self._inside.discard(key)

  def _watched(self, module: nn.Module, method: str, call: Callable[..., Tree], args: tuple[Tree, ...]) -> Tree:
    if module.path == ("final_norm",) and method == "__call__":
      return call(self._at("residual", self._layers, args[0]), *args[1:])
    if module.path[:1] != ("layers",) or len(module.path) < 2:
      return call(*args)
    layer = int(module.path[1])
    at = functools.partial(self._at, layer=layer)
    match module, method:
      case Block(), "prefill":
        return call(at("residual", x=args[0]), *args[1:])
      case AnchorAttention(), "new_state":
        return self._state(layer, call(*args))
      case FollowerAttention(), "prefill":
        return call(args[0], self._state(layer, args[1]), *args[2:])
      case ((AnchorAttention() | FollowerAttention()), "values"):
        return at("values", x=call(*args))
      case ((AnchorAttention() | FollowerAttention()), "output"):
        return at("attention", x=call(at("heads", x=args[0]), *args[1:]))
      case ((Mlp() | Moe()), "__call__") if module.path[2:] == ("mlp",):
        return at("mlp", x=call(*args))
    return call(*args)

  def _at(self, site: Site, layer: int, x: jax.Array) -> jax.Array:
    """What is at a site, after the edits that are meant for it."""
    for edit in self._edits:
      if edit.site == site:
        x = edit(layer, x)
    if site in self._capture:
      self.seen[site][layer] = x
    return x

  def _state(self, layer: int, state: State) -> State:
    """The state that a layer uses; as weights where some are edited."""
    if any(edit.site == "weights" for edit in self._edits):
      state = AttentionWeights(self._at("weights", layer, state.weights()))
    elif "weights" in self._capture:
      self.seen["weights"][layer] = state.weights()
    if "states" in self._capture:
      self.seen["states"][layer] = state
    return state
