"""The whole model: embedding, layers in one of two layouts, norm, head.

Parameters have two layouts with the same leaves (see `sa_jax.params`). The *run layout*, created by ``init``, stacks
each run's layers and scans over them: the compiled program does not grow with depth. The *layer layout* has one subtree
per layer and is unrolled: decoding needs it, because a scan copies each layer's slice of stacked weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.nn.axes import LECUN, with_axes
from sa_jax.nn.block import Blocks, FollowerBlock
from sa_jax.nn.cache import Cache
from sa_jax.nn.layers import Layers, Runs
from sa_jax.nn.norm import Norm
from sa_jax.nn.split import constrain
from sa_jax.nn.state import State
from sa_jax.ops.attention.rows import described, is_array
from sa_jax.params import unstack
from sa_jax.plan import SharingPlan

_EMBEDDING = nn.initializers.normal(0.02)


class Embed(nn.Module):
  """Token embedding, and the output head if tied."""

  config: ModelConfig

  def setup(self) -> None:
    init = with_axes(_EMBEDDING, ("vocab", "embed"))
    shape = (self.config.vocab_size, self.config.embed_dim)
    self.embedding = self.param("embedding", init, shape, self.config.param_dtype)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int32 ``[B, T]`` → ``[B, T, D]``; a token outside the vocabulary gives NaN, not another token's vector."""
    # All-gathered over FSDP first, like all weights: otherwise the looked-up rows would move instead.
    table = constrain(jnp.asarray(self.embedding), ("vocab", None))
    x = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    x = x.astype(self.config.dtype)
    if self.config.embedding_scale != 1:
      x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
    return constrain(x, ("batch", "length", "embed"))

  def logits(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → float32 ``[B, T, V]``."""
    return ops.logits(x, self.embedding, "VD")


class Head(nn.Module):
  """An untied output head."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → float32 ``[B, T, V]``."""
    init = with_axes(LECUN, ("embed", "vocab"))
    shape = (self.config.embed_dim, self.config.vocab_size)
    kernel = jnp.asarray(self.param("kernel", init, shape, self.config.param_dtype))
    if self.config.normalize_head:
      norms = jnp.linalg.norm(kernel.astype(jnp.float32), axis=0, keepdims=True)
      kernel = (kernel / jnp.maximum(norms, 1e-12).astype(kernel.dtype)).astype(kernel.dtype)
    logits = ops.logits(x, kernel, "DV")
    if not self.config.head_bias:
      return logits
    bias = self.param("bias", with_axes(nn.initializers.zeros, ("vocab",)), shape[1:], self.config.param_dtype)
    return logits + jnp.expand_dims(jnp.asarray(bias).astype(jnp.float32), range(logits.ndim - 1))


class Frame(nn.Module):
  """Everything around the layers: embedding, final norm, head.

  Attributes:
    config: the model.
  """

  config: ModelConfig

  def setup(self) -> None:
    self.embed = Embed(self.config)
    self.final_norm = Norm(self.config)
    if not self.config.tie_embeddings:
      self.lm_head = Head(self.config)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The head: ``[B, T, D]`` → float32 ``[B, T, V]``."""
    logits = self.embed.logits(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
    logits = logits * self.config.logits_scale
    if (cap := self.config.logits_softcap) is not None:
      logits = cap * jnp.tanh(logits / cap)
    # A vocabulary that does not divide is split anyway: XLA pads it.
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

  def read(self, x: jax.Array) -> jax.Array:
    """The output ``[B, T, D]`` of the last or another block → logits, float32 ``[B, T, V]``."""
    return self.logits(self.final_norm(x))


class Transformer(Frame):
  """A decoder-only transformer whose layers share attention weights according to a plan.

  Attributes:
    config: the model.
    plan: which layers are anchors and which are followers.
    blocks: the block types; subclasses of ours give variants of the model.

  Raises:
    UserError: see `check_plan`.
  """

  plan: SharingPlan
  blocks: Blocks = Blocks()

  def __post_init__(self) -> None:
    check_plan(self.config, self.plan)
    super().__post_init__()

  def setup(self) -> None:
    super().setup()
    self.layers = Layers(self.config, self.plan, self.blocks)
    self.runs = Runs(self.config, self.plan, self.blocks)

  def __call__(
    self,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    rows: ops.Rows = ops.Rows(),
  ) -> jax.Array:
    """Next-token logits at every position, with parameters in either layout.

    Args:
      tokens: int32 ``[B, T]``; rows may be right-padded.
      lengths: int32 ``[B]``, or None if rows are full. Logits at or past a row's length are meaningless.
      segments: int32 ``[B, T]``, the document of each token in packed rows, each document contiguous; None if a row is
        one document. Tokens attend only within their document.
      rows: anything else that decides which tokens a token may see: a bias, a mask, or non-causal attention.

    Returns:
      float32 ``[B, T, V]``.

    Raises:
      UserError: outside `jax.jit`, if a token is not in the vocabulary (inside it, its row's logits are NaN) or a
        length is not in 1 to T; if rows are packed and RoPE depends on the sequence length.
    """
    return self.logits(self.hidden(tokens, _joined(rows, lengths, segments)))

  def hidden(self, tokens: jax.Array, rows: ops.Rows = ops.Rows()) -> jax.Array:
    """The head's input: the final normalised hidden states ``[B, T, D]`` of tokens int32 ``[B, T]``."""
    rows = self.checked(tokens, rows)
    stack = self.layers if self.has_variable("params", "layers") else self.runs
    return self.final_norm(stack(self.embed(jnp.asarray(tokens)), rows))

  def checked(self, tokens: jax.Array, rows: ops.Rows) -> ops.Rows:
    """Checks a batch and returns the rows, sharded for attention; see `check_tokens` and `check_segments`."""
    check_tokens(tokens, rows.lengths, self.config.vocab_size)
    if rows.segments is None:
      return rows
    check_segments(self.config, tokens, rows.segments)
    # Resharded once for all layers.
    segments = nn.with_logical_constraint(jnp.asarray(rows.segments), ("batch", None))
    return dataclasses.replace(rows, segments=segments)

  def init_layers(self, tokens: jax.Array) -> jax.Array:
    """`__call__` for ``init`` to make the layer layout: ``model.init(key, tokens, method=Transformer.init_layers)``."""
    return self.logits(self.final_norm(self.layers(self.embed(tokens))))

  def states(self, tokens: jax.Array, rows: ops.Rows = ops.Rows()) -> tuple[State, ...]:
    """The attention state that each layer used, indexed by layer; parameters in either layout.

    ``state.weights()`` gives a layer's attention weights ``[B, N, T, T]``; a follower's are its anchor's.
    """
    rows, x = self.checked(tokens, rows), self.embed(jnp.asarray(tokens))
    if self.has_variable("params", "layers"):
      return self.layers.prefill(x, rows)[2]
    layers = unstack(self.variables["params"], self.plan)["layers"]
    apart = Layers(self.config, self.plan, self.blocks, parent=None)
    return nn.apply(lambda bound: bound.prefill(x, rows)[2], apart)({"params": layers})

  def _unstacked(self) -> Layers:
    if self.has_variable("params", "runs"):
      raise UserError(
        "the parameters must be in the layer layout, but are in the run layout: pass "
        "sa_jax.unstack(params, model.plan), or open the model with layout='layers'"
      )
    return self.layers

  def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """Prefills prompts; parameters in the layer layout.

    Args:
      tokens: int32 ``[B, T]``, right-padded.
      lengths: int32 ``[B]``.

    Returns:
      Logits float32 ``[B, V]`` after each row's last token, and the cache of the T tokens.
    """
    x, cache, _ = self._unstacked().prefill(self.embed(tokens), ops.Rows(lengths))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return self.logits(self.final_norm(last))[:, 0], cache

  def step(self, tokens: jax.Array, cache: Cache, positions: jax.Array) -> tuple[jax.Array, Cache]:
    """Decodes one token per row; parameters in the layer layout.

    Args:
      tokens: int32 ``[B]``.
      cache: with room at ``positions``.
      positions: int32 ``[B]``, the slot of each token.

    Returns:
      Logits float32 ``[B, V]`` after the token, and the cache.
    """
    hidden, cache = self.extend(tokens[:, None], cache, ops.Rows(positions + 1, offset=positions))
    return self.logits(hidden)[:, 0], cache

  def extend(self, tokens: jax.Array, cache: Cache, rows: ops.Rows) -> tuple[jax.Array, Cache]:
    """Extends a cache by several tokens per row; parameters in the layer layout.

    Args:
      tokens: int32 ``[B, T]``, right-padded.
      cache: with room for T tokens from the rows' offset on; padding is never attended to.
      rows: offset int32 ``[B]``, the number of cached tokens per row; lengths int32 ``[B]``, tokens per row including
        the new ones.

    Returns:
      The head's input at the new tokens, ``[B, T, D]``, and the cache.

    Raises:
      UserError: outside `jax.jit`, if a row does not fit the cache; inside it, that row's output is NaN.
    """
    fits = _fits(cache, rows)
    x, cache = self._unstacked().extend(self.embed(tokens), cache, rows)
    return jnp.where(fits, self.final_norm(x), jnp.nan), cache


class GradualTransformer(Transformer):
  """A `Transformer` whose followers still have their own queries and keys and use them in part.

  Its parameters are the dense model's, stacked by the plan (`sa_jax.params.stack_unpruned`), in the run layout.
  """

  def __post_init__(self) -> None:
    if self.config.attention_state != "query_key":
      raise UserError("followers can mix attention only with attention_state='query_key'")
    if self.blocks.follower is not FollowerBlock:
      raise UserError(f"only sa_jax's own followers can mix attention, not {self.blocks.follower.__name__}")
    super().__post_init__()

  def __call__(
    self,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    rows: ops.Rows = ops.Rows(),
    share: jax.Array | float = 1.0,
  ) -> jax.Array:
    """Next-token logits; ``share`` as in `hidden`, the rest as in `Transformer`."""
    return self.logits(self.hidden(tokens, _joined(rows, lengths, segments), share))

  def hidden(self, tokens: jax.Array, rows: ops.Rows = ops.Rows(), share: jax.Array | float = 1.0) -> jax.Array:
    """The head's input.

    Args:
      tokens: int32 ``[B, T]``.
      rows: which tokens each token may attend to.
      share: fraction of a follower's attention weights that comes from its anchor; the rest is its own. 0 is the dense
        model, 1 the plan's. With a Python 0.0 the anchor's part is not computed.

    Returns:
      ``[B, T, D]``.
    """
    rows = self.checked(tokens, rows)
    return self.final_norm(self.runs(self.embed(jnp.asarray(tokens)), rows, share))


def _fits(cache: Cache, rows: ops.Rows) -> jax.Array:
  """Whether each row's tokens fit the cache, bool ``[B, 1, 1]``; an error if values are concrete and do not fit."""
  assert rows.lengths is not None, "rows of a cache have lengths"
  if not isinstance(rows.lengths, jax.core.Tracer) and (longest := int(np.max(rows.lengths))) > cache.capacity:
    raise UserError(
      f"a row of {longest} tokens does not fit into a cache of {cache.capacity} slots; use cache.grow({longest})"
    )
  return (jnp.asarray(rows.lengths) <= cache.capacity)[:, None, None]


def _joined(rows: ops.Rows, lengths: jax.Array | None, segments: jax.Array | None) -> ops.Rows:
  """The rows with lengths and segments, if given."""
  return dataclasses.replace(
    rows,
    lengths=rows.lengths if lengths is None else lengths,
    segments=rows.segments if segments is None else segments,
  )


def check_plan(config: ModelConfig, plan: SharingPlan) -> None:
  """Checks that the model can share attention under the plan.

  Raises:
    UserError: if it is not a `SharingPlan`, is for another depth, a follower sees different keys than its anchor, or
      its head map is for another number of heads.
  """
  if not isinstance(plan, SharingPlan):
    raise UserError(f"a model's plan is a SharingPlan, not {plan!r}: SharingPlan.parse reads a plan string")
  if plan.num_layers != config.num_layers:
    raise UserError(f"the plan is for {plan.num_layers} layers, the model has {config.num_layers}")
  window = config.window_of
  sees = lambda layer: f"{layer} ({'global' if window(layer) is None else f'local, {window(layer)} tokens'})"
  if wrong := [layer for layer in plan.followers if not config.may_follow(layer, plan.source[layer])]:
    raise UserError.of(
      f"the plan '{plan}' shares weights between layers that see different keys, but a follower and its anchor "
      f"must see the same (this model's local layers are {list(config.local_layers)})",
      [f"{sees(layer)} follows {sees(plan.source[layer])}" for layer in wrong],
    )
  plan.check_heads(config.num_heads)


def check_segments(config: ModelConfig, tokens: jax.Array, segments: jax.Array | None) -> None:
  """Checks that packed rows are supported and valid.

  Raises:
    UserError: if the model does not support packed rows, or segments are not one integer per token.
  """
  if segments is None:
    return
  if not is_array(segments, jnp.integer) or segments.shape != tokens.shape:
    raise UserError(f"segments must be integers of shape {tokens.shape}, not {described(segments)}")
  if config.rope_depends_on_row:
    raise UserError(
      "the model's rotary embedding depends on a document's length or position in its row: "
      "use one row per document instead of segments"
    )


def check_tokens(tokens: Any, lengths: Any, vocab_size: int) -> None:
  """Checks a batch if its values are concrete, that is, outside `jax.jit`.

  Raises:
    UserError: if tokens are not integers ``[B, T]`` or are empty, one is not in the vocabulary, or a length is not an
      integer in 1 to T.
  """
  if not is_array(tokens, jnp.integer) or len(tokens.shape) != 2:
    raise UserError(f"tokens must be integers of shape [batch, length], not {described(tokens)}")
  if 0 in tokens.shape:
    raise UserError(f"a batch needs at least one row of at least one token, not shape {tokens.shape}")
  if lengths is not None and not (is_array(lengths, jnp.integer) and lengths.shape == tokens.shape[:1]):
    raise UserError(f"lengths must be integers of shape {tokens.shape[:1]}, not {described(lengths)}")
  if isinstance(tokens, jax.core.Tracer):
    return
  # NumPy copies: under a trace, operations on JAX arrays are traced even if their values are concrete.
  tokens = np.asarray(tokens)
  low, high = tokens.min(), tokens.max()
  if low < 0 or high >= vocab_size:
    raise UserError(
      f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}, 0 to {vocab_size - 1}"
    )
  if lengths is not None and not isinstance(lengths, jax.core.Tracer):
    lengths = np.asarray(lengths)
    low, high = lengths.min(), lengths.max()
    if low < 1 or high > tokens.shape[1]:
      raise UserError(f"a length of {low if low < 1 else high} does not fit rows of {tokens.shape[1]} tokens")
