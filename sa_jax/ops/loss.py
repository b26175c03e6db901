"""Log-likelihoods of tokens, and the losses made of them, in chunks, so that ``[B, T, V]`` logits never exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Head = Callable[[jax.Array], jax.Array]
"""From hidden states ``[B, chunk, D]`` to logits ``[B, chunk, V]``."""

# Logits that exist at once on a device when the caller does not say: 256 MB in float32.
_LOGITS = 2**26


def token_log_likelihoods(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability of each token under the logits at its position, in float32.

  Args:
    logits: ``[..., V]``.
    tokens: int ``[...]``; what ``logits`` predict (shift them by one for next-token prediction).

  Returns:
    float32 ``[...]``.
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def next_token_loss(
  head: Head,
  hidden: jax.Array,
  tokens: jax.Array,
  weights: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each token given those before it.

  The backward pass computes each chunk's logits again.

  Args:
    head: from hidden states to logits.
    hidden: ``[B, T, D]``; position ``t`` predicts token ``t + 1``.
    tokens: int ``[B, T]``.
    weights: float ``[B, T]``, how much predicting each token counts, 0 for padding; all 1 when None. The first token
      is not predicted, and the weight it has is not used.
    z_loss: the weight of the squared logarithm of the softmax's normaliser, which keeps logits from drifting
      (Chowdhery et al., arXiv 2204.02311, section 5).
    chunk: positions a row whose logits exist at once; so many that they take 256 MB on a device when None.

  Returns:
    The weighted sum of losses and the sum of weights, float32 scalars: their quotient is the mean, also over several
    batches.

  Raises:
    ValueError: if shapes do not fit, or chunk is not positive.
  """
  targets, weights = _predicted(hidden, tokens, weights)

  def term(hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return _cross_entropy(head(hidden).astype(jnp.float32), targets, z_loss)

  return _over_positions(term, (hidden, targets), weights, _chunk(chunk, head, hidden)), weights.sum()


def distillation_loss(
  head: Head,
  hidden: jax.Array,
  teacher_head: Head,
  teacher_hidden: jax.Array,
  tokens: jax.Array,
  weights: jax.Array | None = None,
  *,
  temperature: float = 1.0,
  alpha: float = 1.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """``(1 - alpha) * cross-entropy + alpha * temperature² * KL(teacher ‖ student)`` of each next token's distribution.

  Hinton et al., arXiv 1503.02531: both distributions are of logits divided by the temperature, and its square keeps the
  gradient's scale. The teacher gets no gradient.

  Args:
    head: the student's.
    hidden: the student's, ``[B, T, D]``.
    teacher_head: the teacher's.
    teacher_hidden: the teacher's, ``[B, T, D']``.
    tokens: as in `next_token_loss`.
    weights: as in `next_token_loss`.
    temperature: positive.
    alpha: 0 to 1.
    chunk: as in `next_token_loss`.

  Returns:
    As `next_token_loss`.

  Raises:
    ValueError: if shapes do not fit, or a number is out of range.
  """
  if not temperature > 0 or not 0 <= alpha <= 1:
    raise ValueError(f"temperature is positive and alpha from 0 to 1, not {temperature} and {alpha}")
  if teacher_hidden.shape[:2] != hidden.shape[:2]:
    raise ValueError(f"teacher and student see the same tokens, not {teacher_hidden.shape[:2]} and {hidden.shape[:2]}")
  targets, weights = _predicted(hidden, tokens, weights)

  def term(hidden: jax.Array, teacher_hidden: jax.Array, targets: jax.Array) -> jax.Array:
    student = head(hidden).astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_head(teacher_hidden).astype(jnp.float32))
    student_log, teacher_log = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
    divergence = jnp.sum(jnp.exp(teacher_log) * (teacher_log - student_log), axis=-1)
    return (1 - alpha) * _cross_entropy(student, targets) + alpha * temperature**2 * divergence

  arrays = (hidden, jax.lax.stop_gradient(teacher_hidden), targets)
  return _over_positions(term, arrays, weights, _chunk(chunk, head, hidden)), weights.sum()


def _cross_entropy(logits: jax.Array, targets: jax.Array, z_loss: float = 0.0) -> jax.Array:
  """Of float32 logits ``[..., V]``: float32 ``[...]``."""
  losses = -token_log_likelihoods(logits, targets)
  return losses + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1)) if z_loss else losses


def _predicted(hidden: jax.Array, tokens: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """The token that each position predicts and how much that counts, ``[B, T]``; the last position predicts nothing."""
  batch, length, _ = hidden.shape
  if tokens.shape != (batch, length) or (weights is not None and weights.shape != tokens.shape):
    raise ValueError(
      f"hidden is [B, T, D], tokens and weights are [B, T], not {hidden.shape}, {tokens.shape}"
      + ("" if weights is None else f", {weights.shape}")
    )
  if weights is None:
    weights = jnp.ones(tokens.shape, jnp.float32)
  return jnp.roll(tokens, -1, axis=1), jnp.roll(weights.astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)


def _chunk(chunk: int | None, head: Head, hidden: jax.Array) -> int:
  """Positions a row whose logits exist at once."""
  if chunk is not None:
    if chunk < 1:
      raise ValueError(f"chunk must be at least 1 position, not {chunk}")
    return chunk
  mesh = jax.sharding.get_abstract_mesh()
  logits = jax.eval_shape(head, jax.ShapeDtypeStruct((hidden.shape[0], 1, hidden.shape[2]), hidden.dtype))
  return max(1, _LOGITS * (1 if mesh.empty else mesh.size) // logits.size)


def _over_positions(
  term: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], weights: jax.Array, chunk: int
) -> jax.Array:
  """The sum of ``weights * term(*arrays)`` over positions, one chunk after the other, each recomputed backward."""
  batch, length = weights.shape
  steps = -(-length // min(chunk, length))

  def chunks(x: jax.Array) -> jax.Array:
    """``[B, T, ...]`` → ``[steps, B, chunk, ...]``, zeros after the end.

    A chunk takes every ``steps``-th position: where the length is split over devices, each has its part of every chunk.
    """
    x = jnp.pad(x, ((0, 0), (0, -length % steps)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, steps, *x.shape[2:]), 2, 0)

  @jax.checkpoint
  def one(total: jax.Array, inputs: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, None]:
    weights, arrays = inputs
    return total + jnp.sum(term(*arrays) * weights), None

  total, _ = jax.lax.scan(one, jnp.float32(0.0), (chunks(weights), tuple(chunks(x) for x in arrays)))
  return total
