"""Inspecting and editing activations, by layer number, in both parameter layouts.

In the layer layout, the blocks' named methods are intercepted; parameters in the run layout are unstacked inside the
program. Which layer and heads an edit changes is data, so one program serves a whole sweep.
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
from sa_jax.distributed import same_call_on_all
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
"""What can be captured and edited in a layer:

* ``residual``: ``[B, T, D]``, the layer's input; index ``L`` is the last layer's output.
* ``weights``: ``[B, N, T, S]``, the attention weights it uses; a follower's are its anchor's, including edits there.
* ``values``: ``[B, T, K, R]``.
* ``heads``: ``[B, T, N, R]``, the heads' outputs, before the output projection.
* ``attention``, ``mlp``: ``[B, T, D]``, their outputs, before a post-norm if the family has one.
"""

Captured = Literal["residual", "weights", "values", "heads", "attention", "mlp", "states"]
"""The sites, and ``states``, the attention state that each layer uses."""

_TOKENS: dict[Site, int] = {"residual": 1, "weights": 2, "values": 1, "heads": 1, "attention": 1, "mlp": 1}
_HEADS: dict[Site, int] = {"weights": 1, "values": 2, "heads": 2}


@struct.dataclass
class Edit:
  """A change of one layer at a site: ``x`` becomes ``keep * x + value`` at some heads and positions.

  `ablate`, `patch` and `steer` make the usual ones.

  Attributes:
    site: where.
    layer: int32 ``[]``, the layer.
    value: broadcasts to the site's array.
    keep: factor for the existing activation.
    heads: int32 ``[h]``, the heads; None for all.
    positions: int32 ``[p]``, the tokens (for weights: the queries); None for all.
  """

  site: Site = struct.field(pytree_node=False)
  layer: Tree
  value: Tree
  keep: Tree = 0.0
  heads: Tree = None
  positions: Tree = None

  def __call__(self, layer: int, x: jax.Array) -> jax.Array:
    """The array of a layer at the site, edited if the edit is for this layer."""
    where = jnp.asarray(self.layer) == layer
    chosen = jnp.broadcast_to(where, x.shape)
    for numbers, axis in ((self.heads, _HEADS.get(self.site)), (self.positions, _TOKENS[self.site])):
      if numbers is not None and axis is not None:
        meant = (jnp.arange(x.shape[axis])[:, None] == jnp.asarray(numbers).reshape(1, -1)).any(axis=1)
        chosen &= jnp.broadcast_to(jnp.expand_dims(meant, [each for each in range(x.ndim) if each != axis]), x.shape)
    value = jnp.broadcast_to(jnp.asarray(self.value, jnp.float32), x.shape)
    kept = jnp.where(jnp.asarray(self.keep) == 0, 0.0, self.keep * x.astype(jnp.float32))  # nothing, not even of NaN
    return jnp.where(chosen, (kept + value).astype(x.dtype), x)


def ablate(site: Site, layer: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None) -> Edit:
  """Sets a layer's array at a site to zero, at some heads and positions.

  Args:
    site: where.
    layer: int ``[]``, the layer.
    heads: int ``[h]``, the heads; None for all.
    positions: int ``[p]``, the tokens (for weights: the queries); None for all.
  """
  return Edit(site, layer, 0.0, 0.0, heads, positions)


def patch(
  site: Site, layer: ArrayLike, value: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None
) -> Edit:
  """Replaces a layer's array at a site, for example by one that `look` captured in another model or text.

  Args:
    site: where.
    layer: int ``[]``, the layer.
    value: broadcasts to the whole array of the site (see `Site`).
    heads: int ``[h]``, the heads; None for all.
    positions: int ``[p]``, the tokens (for weights: the queries); None for all.
  """
  return Edit(site, layer, value, 0.0, heads, positions)


def steer(
  site: Site, layer: ArrayLike, value: ArrayLike, heads: ArrayLike | None = None, positions: ArrayLike | None = None
) -> Edit:
  """Adds to a layer's array at a site.

  Args:
    site: where.
    layer: int ``[]``, the layer.
    value: added; broadcasts to the whole array of the site (see `Site`).
    heads: int ``[h]``, the heads; None for all.
    positions: int ``[p]``, the tokens (for weights: the queries); None for all.
  """
  return Edit(site, layer, value, 1.0, heads, positions)


class Inspection(NamedTuple):
  """What `look` returns.

  Attributes:
    logits: float32 ``[B, T, V]``.
    seen: captured arrays by name, one per layer in order; ``residual`` has one more.
  """

  logits: jax.Array
  seen: dict[str, tuple[Tree, ...]]


@same_call_on_all
def look(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  rows: ops.Rows = ops.Rows(),
  capture: Sequence[Captured] = (),
  edits: Sequence[Edit] = (),
) -> Inspection:
  """A forward pass that captures and edits activations.

  Captured activations include the edits at their site.

  Args:
    model: under any plan.
    params: in either layout.
    tokens: int ``[B, T]``.
    rows: which tokens each token may attend to: lengths, documents, a bias, a mask.
    capture: what to return in addition to the logits.
    edits: applied in this order if several are at the same site.

  Raises:
    UserError: if a site is unknown, or an edit's layer or head does not exist.
  """
  tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  check_tokens(tokens, rows.lengths, model.config.vocab_size)
  if wrong := [name for name in capture if name not in get_args(Captured)]:
    raise UserError(f"look cannot capture {wrong}; it captures {', '.join(get_args(Captured))}")
  _check(edits, model)
  return _look(model, params, jnp.asarray(tokens), rows, tuple(edits), capture=tuple(dict.fromkeys(capture)))


def logit_lens(model: Transformer, params: Params, residuals: Sequence[jax.Array]) -> jax.Array:
  """The model's prediction if it ended after each layer (nostalgebraist's logit lens).

  Args:
    model: its final norm and head are applied.
    params: in either layout.
    residuals: ``[B, T, D]`` each, such as ``look(…, capture=["residual"]).seen["residual"]``.

  Returns:
    float32 ``[len(residuals), B, T, V]``; for the last residual these are the model's logits.
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
      faults.append(f"edit {number} has the unknown site {edit.site!r}; choose from {', '.join(_TOKENS)}")
      continue
    last = layers if edit.site == "residual" else layers - 1
    heads = model.config.num_kv_heads if edit.site == "values" else model.config.num_heads
    if edit.heads is not None and edit.site not in _HEADS:
      faults.append(f"edit {number} selects heads, but {edit.site!r} has none")
    for name, values, most in (("layer", edit.layer, last), ("heads", edit.heads, heads - 1)):
      known = values is not None and not isinstance(values, jax.core.Tracer)
      if known and not ((np.asarray(values) >= 0) & (np.asarray(values) <= most)).all():
        faults.append(f"edit {number} has {name} {np.asarray(values).tolist()}; must be 0 to {most}")
  if faults:
    raise UserError.of("look", faults)


@traced_where_parameters_are
def _look(
  model: Transformer, params: Params, tokens: jax.Array, rows: ops.Rows, edits: tuple[Edit, ...], capture: Tree
) -> Inspection:
  return _look_inside(model, nn.unbox(params), tokens, rows, edits, capture=capture)


@program(static_argnames=("model", "capture"))
def _look_inside(
  model: Transformer, params: Params, tokens: jax.Array, rows: ops.Rows, edits: tuple[Edit, ...], *, capture: Tree
) -> Inspection:
  watcher = _Watcher(model.config.num_layers, edits, capture)
  with nn.intercept_methods(watcher):
    logits = apply(model, as_layers(params, model.plan), Transformer.__call__, tokens, None, None, rows)
  return Inspection(
    logits, {name: tuple(watcher.seen[name][layer] for layer in sorted(watcher.seen[name])) for name in capture}
  )


class _Watcher:
  """Intercepts the blocks' methods; see `flax.linen.intercept_methods`."""

  def __init__(self, layers: int, edits: tuple[Edit, ...], capture: tuple[str, ...]):
    self._layers, self._edits, self._capture = layers, edits, capture
    self.seen: dict[str, dict[int, Tree]] = {name: {} for name in capture}
    self._inside: set[tuple[tuple[str, ...], str]] = set()

  def __call__(
    self, call: Callable[..., Tree], args: Tree, kwargs: Tree, context: nn.module.InterceptorContext
  ) -> Tree:
    """Intercepts a method call; a call of the parent class's method inside it belongs to the same call."""
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
    """The array at a site, after the edits for it."""
    for edit in self._edits:
      if edit.site == site:
        x = edit(layer, x)
    if site in self._capture:
      self.seen[site][layer] = x
    return x

  def _state(self, layer: int, state: State) -> State:
    """The state that a layer uses, in the form of weights if any are edited."""
    if any(edit.site == "weights" for edit in self._edits):
      state = AttentionWeights(self._at("weights", layer, state.weights()))
    elif "weights" in self._capture:
      self.seen["weights"][layer] = state.weights()
    if "states" in self._capture:
      self.seen["states"][layer] = state
    return state
