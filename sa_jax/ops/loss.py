"""Token log-likelihoods and losses, computed in chunks so that ``[B, T, V]`` logits are never materialised."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError
from sa_jax.trees import Tree

ToLogits = Callable[[jax.Array], jax.Array]
"""From hidden states ``[B, chunk, D]`` to logits ``[B, chunk, V]``."""


class Predictions(NamedTuple):
  """A model's predictions of the next tokens.

  Attributes:
    head: from hidden states to logits.
    hidden: ``[B, T, D]``.
  """

  head: ToLogits
  hidden: jax.Array


class Teaching(NamedTuple):
  """How a student learns from a teacher's predictions.

  Attributes:
    temperature: positive; logits are divided by it.
    alpha: 0 to 1, the teacher's weight relative to the text's own tokens.
  """

  temperature: float = 1.0
  alpha: float = 1.0


# Default number of logits in memory per device: 2 GiB in float32. Each chunk reads the head's weights and adds to their
# gradient; in chunks much shorter than the embedding dimension, that would dominate.
_LOGITS = 2**29


def token_log_likelihoods(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability of each token under the logits at its position, in float32.

  Args:
    logits: ``[..., V]``.
    tokens: int ``[...]``, predicted by ``logits`` (shift them by one for next-token prediction).

  Returns:
    float32 ``[...]``; NaN for a token outside the vocabulary.
  """
  logits = logits.astype(jnp.float32)
  if jnp.iinfo(tokens.dtype).bits < 32:
    tokens = tokens.astype(jnp.int32)  # the vocabulary may exceed their dtype
  # Not a gather, whose gradient is a scatter: this gradient fuses with the softmax's into one pass.
  is_token = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1) == tokens[..., None]
  chosen = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
  chosen = jnp.where((tokens >= 0) & (tokens < logits.shape[-1]), chosen, jnp.nan)
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def next_token_loss(
  head: ToLogits,
  hidden: jax.Array,
  tokens: jax.Array,
  weights: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each token given those before it.

  Gradients, of hidden states and of what the head closes over, are computed in the forward pass; weights get none.

  Args:
    head: from hidden states to logits.
    hidden: ``[B, T, D]``; position ``t`` predicts token ``t + 1``.
    tokens: int ``[B, T]``.
    weights: float ``[B, T]``, the weight of predicting each token, 0 for padding, which may hold any value; None for
      all 1. The first token is not predicted, so its weight is not used.
    z_loss: the weight of the squared log-sum-exp of the logits, which keeps logits from drifting
      (Chowdhery et al., arXiv 2204.02311, section 5).
    chunk: positions per row whose logits are in memory at a time; None for 2 GiB per device.

  Returns:
    The weighted sum of losses and the sum of weights, float32 scalars; their quotient is the mean, also across
    batches.

  Raises:
    UserError: if shapes do not match, or chunk is not positive.
  """
  targets, weights = _predicted(hidden, tokens, weights)

  def term(hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return _cross_entropy(head(hidden).astype(jnp.float32), targets, z_loss)

  return _over_positions(term, (hidden, targets), weights, _chunk(chunk, head, hidden)), weights.sum()


def distillation_loss(
  student: Predictions,
  teacher: Predictions,
  tokens: jax.Array,
  weights: jax.Array | None = None,
  *,
  how: Teaching = Teaching(),
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """``(1 - alpha) * cross-entropy + alpha * temperature² * KL(teacher ‖ student)`` of each next token's distribution.

  Hinton et al., arXiv 1503.02531: both distributions use logits divided by the temperature; its square preserves the
  gradient's scale. The teacher gets no gradient.

  Args:
    student: its predictions.
    teacher: its predictions of the same tokens, from hidden states of any width.
    tokens: as in `next_token_loss`.
    weights: as in `next_token_loss`.
    how: temperature and alpha.
    chunk: as in `next_token_loss`.

  Returns:
    As `next_token_loss`.

  Raises:
    UserError: if shapes do not fit, or a number is out of range.
  """
  temperature, alpha = how
  if not temperature > 0 or not 0 <= alpha <= 1:
    raise UserError(f"temperature must be positive and alpha 0 to 1, not {temperature} and {alpha}")
  if teacher.hidden.shape[:2] != student.hidden.shape[:2]:
    raise UserError(
      f"teacher and student must have the same tokens, not {teacher.hidden.shape[:2]} and {student.hidden.shape[:2]}"
    )
  targets, weights = _predicted(student.hidden, tokens, weights)

  def term(hidden: jax.Array, teacher_hidden: jax.Array, targets: jax.Array) -> jax.Array:
    logits = student.head(hidden).astype(jnp.float32)
    losses = jnp.zeros(targets.shape, jnp.float32)
    if alpha < 1:
      losses += (1 - alpha) * _cross_entropy(logits, targets)
    if alpha > 0:
      taught = teacher.head(teacher_hidden).astype(jnp.float32)
      losses += alpha * temperature**2 * _divergence(logits / temperature, taught / temperature)
    return losses

  arrays = (student.hidden, jax.lax.stop_gradient(teacher.hidden), targets)
  return _over_positions(term, arrays, weights, _chunk(chunk, *student)), weights.sum()


def _cross_entropy(logits: jax.Array, targets: jax.Array, z_loss: float = 0.0) -> jax.Array:
  """Float32 logits ``[..., V]`` → float32 ``[...]``."""
  losses = -token_log_likelihoods(logits, targets)
  return losses + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1)) if z_loss else losses


@jax.custom_vjp
def _divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """KL(teacher ‖ student) from float32 logits ``[..., V]``: float32 ``[...]``.

  The teacher gets no gradient. Logits are read once for the maxima, once for all sums, and once for the gradient, which
  is the difference of the two distributions.
  """
  return _divergence_forward(student, teacher)[0]


def _divergence_forward(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  maxima = [logits.max(axis=-1, keepdims=True) for logits in (student, teacher)]
  below, below_taught = student - maxima[0], teacher - maxima[1]
  weights = jnp.exp(below_taught)
  sums = [jnp.sum(each, axis=-1, keepdims=True) for each in (jnp.exp(below), weights)]
  apart = jnp.sum(weights * (below_taught - below), axis=-1, keepdims=True)
  divergence = apart / sums[1] + jnp.log(sums[0]) - jnp.log(sums[1])
  log_sums = [top + jnp.log(total) for top, total in zip(maxima, sums, strict=True)]
  return divergence[..., 0], (student, teacher, *log_sums)


def _divergence_backward(residuals: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, None]:
  student, teacher, log_sum, log_sum_taught = residuals
  return d_out[..., None] * (jnp.exp(student - log_sum) - jnp.exp(teacher - log_sum_taught)), None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _predicted(hidden: jax.Array, tokens: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """The token that each position predicts and its weight, ``[B, T]``; the last position predicts nothing."""
  batch, length, _ = hidden.shape
  if tokens.shape != (batch, length) or (weights is not None and weights.shape != tokens.shape):
    raise UserError(
      f"hidden must be [B, T, D], tokens and weights [B, T], not {hidden.shape}, {tokens.shape}"
      + ("" if weights is None else f", {weights.shape}")
    )
  if weights is None:
    weights = jnp.ones(tokens.shape, jnp.float32)
  weights = jnp.roll(weights.astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
  # Padding may hold non-tokens such as -100, whose loss is NaN, and NaN times zero is NaN.
  return jnp.where(weights != 0, jnp.roll(tokens, -1, axis=1), 0), weights


def _chunk(chunk: int | None, head: ToLogits, hidden: jax.Array) -> int:
  """Positions per row whose logits are in memory at a time."""
  if chunk is not None:
    if chunk < 1:
      raise UserError(f"chunk must be at least 1 position, not {chunk}")
    return chunk
  mesh = jax.sharding.get_abstract_mesh()
  logits = jax.eval_shape(head, jax.ShapeDtypeStruct((hidden.shape[0], 1, hidden.shape[2]), hidden.dtype))
  return max(1, _LOGITS * (1 if mesh.empty else mesh.size) // logits.size)


def _over_positions(
  term: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], weights: jax.Array, chunk: int
) -> jax.Array:
  """The sum of ``weights * term(*arrays)`` over positions, chunk by chunk; weights get no gradient."""
  batch, length = weights.shape
  steps = -(-length // min(chunk, length))

  def chunks(x: jax.Array) -> jax.Array:
    """``[B, T, ...]`` → ``[steps, B, chunk, ...]``, zeros after the end.

    A chunk takes every ``steps``-th position: if the length is sharded, each device has its part of every chunk.
    """
    x = jnp.pad(x, ((0, 0), (0, -length % steps)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, steps, *x.shape[2:]), 2, 0)

  inputs = tuple(chunks(x) for x in (*arrays, weights))
  # The head's parameters, which the term closes over, become differentiable arguments.
  term, params = jax.closure_convert(term, *(x[0] for x in inputs[:-1]))
  return _sum_of_chunks(term, tuple(params), inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(
  term: Callable[..., jax.Array], params: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]
) -> jax.Array:
  """The sum of ``weights * term(*arrays, *params)`` over stacked chunks of ``(*arrays, weights)``.

  A scalar's gradient is known up to a factor, so the forward pass computes it too, while it has the logits: they are
  never recomputed.
  """

  def one(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    *arrays, weights = inputs
    return total + jnp.sum(term(*arrays, *params) * weights), None

  return jax.lax.scan(one, jnp.float32(0.0), inputs)[0]


def _sum_with_gradients(
  term: Callable[..., jax.Array], params: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[Tree, ...]]:
  def of_chunk(params: tuple[jax.Array, ...], hidden: jax.Array, *others: jax.Array) -> jax.Array:
    *arrays, weights = others
    return jnp.sum(term(hidden, *arrays, *params) * weights)

  def one(carry: tuple[jax.Array, Tree], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Tree], jax.Array]:
    total, sums = carry
    value, (gradients, d_hidden) = jax.value_and_grad(of_chunk, argnums=(0, 1))(params, *inputs)
    return (total + value, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, gradients)), d_hidden

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  (total, sums), d_hidden = jax.lax.scan(one, (jnp.float32(0.0), zeros), inputs)
  gradients = jax.tree.map(lambda s, x: s.astype(x.dtype), sums, params)
  return total, (gradients, d_hidden, inputs[1:])


def _scaled(_: Tree, residuals: tuple[Tree, ...], factor: jax.Array) -> tuple[Tree, Tree]:
  gradients, d_hidden, others = residuals
  scale = lambda x: x * factor.astype(x.dtype)
  return jax.tree.map(scale, gradients), (scale(d_hidden), *(None for _ in others))


_sum_of_chunks.defvjp(_sum_with_gradients, _scaled)
