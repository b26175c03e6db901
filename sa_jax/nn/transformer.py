"""The whole model: embedding, layers in one of two layouts, norm, head.

Parameters come in two layouts with the same leaves (see `sa_jax.params`). The *run layout*, which ``init`` makes, keeps
each run's layers stacked and scans over them: the compiled program does not grow with depth. The *layer layout* keeps
one subtree a layer and is unrolled: decoding needs it, because a scan copies each layer's slice of stacked weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.nn.block import AnchorBlock, FollowerBlock
from sa_jax.nn.cache import Cache
from sa_jax.nn.norm import RMSNorm
from sa_jax.nn.state import Local, State
from sa_jax.plan import HeadMap, Run, SharingPlan

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Embed(nn.Module):
  """Token embedding, and the output head where the two are tied."""

  config: ModelConfig

  def setup(self) -> None:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    shape = (self.config.vocab_size, self.config.embed_dim)
    self.embedding = self.param("embedding", init, shape, self.config.param_dtype)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int32 ``[B, T]`` → ``[B, T, D]``; a token outside the vocabulary gives NaN, never another token's vector."""
    x = jnp.asarray(self.embedding).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    x = x.astype(self.config.dtype)
    if self.config.scale_embeddings:
      x = x * jnp.asarray(math.sqrt(self.config.embed_dim), x.dtype)
    return nn.with_logical_constraint(x, ("batch", "length", "embed"))

  def logits(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → float32 ``[B, T, V]``."""
    return jnp.einsum("BTD,VD->BTV", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32)


class Head(nn.Module):
  """The output head of a model that does not tie it to the embedding."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """``[B, T, D]`` → float32 ``[B, T, V]``."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
    shape = (self.config.embed_dim, self.config.vocab_size)
    kernel = self.param("kernel", init, shape, self.config.param_dtype)
    if self.config.normalize_head:
      norms = jnp.linalg.norm(kernel.astype(jnp.float32), axis=0, keepdims=True)
      kernel = (kernel / jnp.maximum(norms, 1e-12).astype(kernel.dtype)).astype(kernel.dtype)
    return jnp.einsum("BTD,DV->BTV", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _with_heads(state: Any, head_map: HeadMap | jax.Array | None) -> Any:
  """A state, in the form that it has, as a follower with this head map uses it."""
  return state if head_map is None else state.take_heads(jnp.asarray(head_map, jnp.int32))


def _remat(config: ModelConfig, step: Callable[..., Any], repeats: int) -> Callable[..., Any]:
  """A step of a scan, as the config's ``remat`` has it; ``repeats`` is how often the compiled loops run it."""
  if config.remat == "none":
    return step
  # A loop of one iteration is no loop to the compiler, which would find the recomputation superfluous.
  return nn.remat(step, prevent_cse=repeats == 1, policy=_REMAT_POLICIES[config.remat])


class Group(nn.Module):
  """An anchor block and its followers; the state is broadcast into a scan over them.

  Under remat the backward pass recomputes block by block, from each block's input and the anchor's state: to recompute
  whole groups would take the activations of all followers at once. Attention weights are too large to keep one state a
  group; with them, `Runs` recomputes whole groups.

  Attributes:
    config: the model.
    followers: how many followers the group has.
    groups: how many groups the scan around this one covers.
  """

  config: ModelConfig
  followers: int
  groups: int = 1

  @nn.compact
  def __call__(
    self, x: jax.Array, lengths: jax.Array | None, local: Local = False, head_maps: jax.Array | None = None
  ) -> jax.Array:
    """``[B, T, D]`` → the same; ``head_maps`` int32 ``[followers, N]``, or None where no follower has one."""
    anchor = self._remat(lambda block, x, lengths: block(x, lengths, local), self.groups)
    x, state = anchor(AnchorBlock(self.config, name="anchor"), x, lengths)
    if self.followers:
      follower = self._remat(lambda block, x, state: block(x, state), self.groups * self.followers)
      scan = nn.scan(
        lambda block, x, state, head_map: (follower(block, x, _with_heads(state, head_map)), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=self.followers,
        metadata_params={nn.PARTITION_NAME: "followers"},
      )
      x, _ = scan(FollowerBlock(self.config, name="followers"), x, state, head_maps)
    return x

  def _remat(self, block: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    return block if self.config.attention_state == "attention_weights" else _remat(self.config, block, repeats)


class Runs(nn.Module):
  """The layers in the run layout: a loop over runs, a scan over each run's groups.

  The attention state lives inside a group and never enters the outer scan's carry.
  """

  config: ModelConfig
  plan: SharingPlan

  @nn.compact
  def __call__(self, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """``[B, T, D]`` → the same."""
    for index, run in enumerate(self.plan.runs):
      # Where the run's groups differ in kind, each tells its own: one program, whatever the pattern and the depth.
      kinds = [layer in self.config.local_layers for layer in run.layers if self.plan.is_anchor(layer)]
      kind = kinds[0] if len(set(kinds)) == 1 else None
      step: Callable[..., Any] = functools.partial(_group_step, kind)
      if self.config.attention_state == "attention_weights":
        step = _remat(self.config, step, run.groups)
      scan = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=run.groups,
        metadata_params={nn.PARTITION_NAME: "groups"},
      )
      local = jnp.asarray(kinds) if kind is None else None
      group = Group(self.config, run.followers, run.groups, name=str(index))
      x, _ = scan(group, x, lengths, (local, self._head_maps(run)))
    return x

  def _head_maps(self, run: Run) -> jax.Array | None:
    """The head maps of a run's followers, int32 ``[groups, followers, N]``; None if it has none."""
    followers = [layer for layer in run.layers if not self.plan.is_anchor(layer)]
    maps = [self.plan.head_map_of(layer) for layer in followers]
    if not any(maps):
      return None
    filled = [tuple(range(self.config.num_heads)) if entry is None else entry for entry in maps]
    return jnp.asarray(filled, jnp.int32).reshape(run.groups, run.followers, self.config.num_heads)


def _group_step(
  kind: bool | None,
  group: Group,
  x: jax.Array,
  lengths: jax.Array | None,
  own: tuple[jax.Array | None, jax.Array | None],
) -> tuple[jax.Array, None]:
  """One step of the scan over a run's groups: of the kind that all of them are or of its own, with its head maps."""
  local, head_maps = own
  return group(x, lengths, local if kind is None else kind, head_maps), None


class Layers(nn.Module):
  """The layers in the layer layout, unrolled."""

  config: ModelConfig
  plan: SharingPlan

  def setup(self) -> None:
    self.blocks: list[Any] = [
      (AnchorBlock if self.plan.is_anchor(layer) else FollowerBlock)(self.config, name=str(layer))
      for layer in range(self.plan.num_layers)
    ]

  def __call__(self, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """``[B, T, D]`` → the same."""
    return self.prefill(x, lengths)[0]

  def prefill(self, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, Cache, tuple[State, ...]]:
    """`__call__` that also returns the cache of the T tokens, and the state that each layer used."""
    caches, states = [], []
    for layer, block in enumerate(self.blocks):
      if isinstance(block, AnchorBlock):
        x, state, cache = block.prefill(x, lengths, layer in self.config.local_layers)
        used = state
      else:
        used = _with_heads(state, self.plan.head_map_of(layer))
        x, cache = block.prefill(x, used)
      caches.append(cache)
      states.append(used)
    return x, Cache(tuple(caches)), tuple(states)

  def extend(self, x: jax.Array, cache: Cache, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """New tokens, ``[B, T, D]``, at int32 ``positions [B, T]`` of the cache, in rows of int32 ``lengths [B]``."""
    caches = list(cache.layers)
    for anchor, followers in self.plan.groups:
      block, local = self.blocks[anchor], anchor in self.config.local_layers
      if not followers and x.shape[1] == 1:
        x, caches[anchor] = block.step_alone(x, caches[anchor], positions[:, 0], local)
        continue
      x, state, caches[anchor] = block.extend(x, caches[anchor], positions, lengths, local)
      for layer in followers:
        used = _with_heads(state, self.plan.head_map_of(layer))
        x, caches[layer] = self.blocks[layer].extend(x, used, caches[layer], positions)
    return x, Cache(tuple(caches))


class Frame(nn.Module):
  """What is around the layers: embedding, last norm, head.

  Attributes:
    config: the model.
  """

  config: ModelConfig

  def setup(self) -> None:
    self.embed = Embed(self.config)
    self.final_norm = RMSNorm(self.config)
    if not self.config.tie_embeddings:
      self.lm_head = Head(self.config)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """The head: ``[B, T, D]`` → float32 ``[B, T, V]``."""
    logits = self.embed.logits(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
    if (cap := self.config.logits_softcap) is not None:
      logits = cap * jnp.tanh(logits / cap)
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))


class Transformer(Frame):
  """A decoder-only transformer whose layers share attention weights by a plan.

  Attributes:
    config: the model.
    plan: which layers are anchors and which follow them.

  Raises:
    ValueError: see `check_plan`.
  """

  plan: SharingPlan

  def __post_init__(self) -> None:
    check_plan(self.config, self.plan)
    super().__post_init__()

  def setup(self) -> None:
    super().setup()
    self.layers = Layers(self.config, self.plan)
    self.runs = Runs(self.config, self.plan)

  def __call__(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Next-token logits at every position, with parameters in either layout.

    Args:
      tokens: int32 ``[B, T]``; rows may be right-padded.
      lengths: int32 ``[B]``, or None when rows are full. Logits at or past a row's length mean nothing.

    Returns:
      float32 ``[B, T, V]``.

    Raises:
      ValueError: outside `jax.jit`, if a token is not in the vocabulary (inside it, its row's logits are NaN) or a
        length is not in 1 to T.
    """
    return self.logits(self.hidden(tokens, lengths))

  def hidden(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """What the head reads: the normalised last hidden states ``[B, T, D]``; arguments as in `__call__`."""
    check_tokens(tokens, lengths, self.config.vocab_size)
    stack = self.layers if self.has_variable("params", "layers") else self.runs
    return self.final_norm(stack(self.embed(jnp.asarray(tokens)), lengths))

  def init_layers(self, tokens: jax.Array) -> jax.Array:
    """`__call__` for ``init`` to make the layer layout: ``model.init(key, tokens, method="init_layers")``."""
    return self.logits(self.final_norm(self.layers(self.embed(tokens), None)))

  def states(self, tokens: jax.Array, lengths: jax.Array | None = None) -> tuple[State, ...]:
    """The attention state that each layer used; arguments as in `__call__`, parameters in the layer layout.

    ``state.weights()`` gives a layer's attention weights ``[B, N, T, T]``; a follower's are its anchor's.
    """
    check_tokens(tokens, lengths, self.config.vocab_size)
    return self.layers.prefill(self.embed(jnp.asarray(tokens)), lengths)[2]

  def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads prompts; parameters in the layer layout.

    Args:
      tokens: int32 ``[B, T]``, right-padded.
      lengths: int32 ``[B]``.

    Returns:
      float32 ``[B, V]`` logits after each row's last token, and the cache of the T tokens.
    """
    x, cache, _ = self.layers.prefill(self.embed(tokens), lengths)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return self.logits(self.final_norm(last))[:, 0], cache

  def step(self, tokens: jax.Array, cache: Cache, positions: jax.Array) -> tuple[jax.Array, Cache]:
    """Decodes one token a row; parameters in the layer layout.

    Args:
      tokens: int32 ``[B]``.
      cache: with room at ``positions``.
      positions: int32 ``[B]``, the slot of each token.

    Returns:
      float32 ``[B, V]`` logits after the token, and the cache.
    """
    hidden, cache = self.extend(tokens[:, None], cache, positions, positions + 1)
    return self.logits(hidden)[:, 0], cache

  def extend(self, tokens: jax.Array, cache: Cache, starts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads on from a cache; parameters in the layer layout.

    Args:
      tokens: int32 ``[B, T]``, right-padded.
      cache: with room for T tokens from ``starts`` on; of the padding nothing is ever seen.
      starts: int32 ``[B]``, how many tokens of each row are in the cache.
      lengths: int32 ``[B]``, tokens of each row, the new ones included.

    Returns:
      What the head reads at the new tokens, ``[B, T, D]``, and the cache.
    """
    positions = starts[:, None] + jnp.arange(tokens.shape[1])[None]
    x, cache = self.layers.extend(self.embed(tokens), cache, positions, lengths)
    return self.final_norm(x), cache


def check_plan(config: ModelConfig, plan: SharingPlan) -> None:
  """Checks that the model can share attention by the plan.

  Raises:
    ValueError: if the plan is for another depth, a follower sees other keys than its anchor, or its head map is for
      another number of heads.
  """
  if plan.num_layers != config.num_layers:
    raise ValueError(f"the plan is for {plan.num_layers} layers, the model has {config.num_layers}")
  kind = lambda layer: f"local, {config.window} tokens" if layer in config.local_layers else "global"
  if wrong := [layer for layer in plan.followers if kind(layer) != kind(plan.source[layer])]:
    pairs = ", ".join(
      f"{layer} ({kind(layer)}) follows {plan.source[layer]} ({kind(plan.source[layer])})" for layer in wrong
    )
    raise ValueError(
      f"the plan '{plan}' shares weights between layers that see different keys: {pairs}; a follower needs an anchor "
      f"of its own kind. This model's local layers are {list(config.local_layers)}"
    )
  plan.check_heads(config.num_heads)


def check_tokens(tokens: Any, lengths: Any, vocab_size: int) -> None:
  """Checks a batch where its values are known, that is, outside `jax.jit`.

  Raises:
    ValueError: if tokens are not integers ``[B, T]`` or are none, one is not in the vocabulary, or a length is not an
      integer in 1 to T.
  """
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens are integers of shape [batch, length], not {tokens.dtype} of shape {tokens.shape}")
  if not tokens.size:
    raise ValueError(f"a batch needs at least one row of at least one token, not shape {tokens.shape}")
  if lengths is not None and (lengths.shape != tokens.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer)):
    raise ValueError(
      f"lengths are integers, one length a row, {tokens.shape[:1]}; not {lengths.dtype} of shape {lengths.shape}"
    )
  if isinstance(tokens, jax.core.Tracer):
    return
  # NumPy's copies: under a trace, operations on JAX arrays are traced even where their values are known.
  tokens = np.asarray(tokens)
  low, high = tokens.min(), tokens.max()
  if low < 0 or high >= vocab_size:
    raise ValueError(
      f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}, 0 to {vocab_size - 1}"
    )
  if lengths is not None and not isinstance(lengths, jax.core.Tracer):
    lengths = np.asarray(lengths)
    low, high = lengths.min(), lengths.max()
    if low < 1 or high > tokens.shape[1]:
      raise ValueError(f"a length of {low if low < 1 else high} does not fit rows of {tokens.shape[1]} tokens")
