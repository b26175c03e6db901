"""Log-likelihoods of tokens, and the loss made of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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
  head: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  tokens: jax.Array,
  weights: jax.Array | None = None,
  *,
  chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each token given those before it, in chunks, so that ``[B, T, V]`` logits never exist.

  The backward pass computes each chunk's logits again.

  Args:
    head: from hidden states ``[B, chunk, D]`` to logits ``[B, chunk, V]``.
    hidden: ``[B, T, D]``; position ``t`` predicts token ``t + 1``.
    tokens: int ``[B, T]``.
    weights: float ``[B, T]``, how much predicting each token counts, 0 for padding; all 1 when None. The first token
      is not predicted, and the weight it has is not used.
    chunk: positions a row whose logits exist at once.

  Returns:
    The weighted sum of negative log-likelihoods and the sum of weights, float32 scalars: their quotient is the mean,
    also over several batches.

  Raises:
    ValueError: if shapes do not fit, or chunk is not positive.
  """
  batch, length, _ = hidden.shape
  if tokens.shape != (batch, length) or (weights is not None and weights.shape != tokens.shape):
    raise ValueError(
      f"hidden is [B, T, D], tokens and weights are [B, T], not {hidden.shape}, {tokens.shape}"
      + ("" if weights is None else f", {weights.shape}")
    )
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1 position, not {chunk}")
  if weights is None:
    weights = jnp.ones(tokens.shape, jnp.float32)
  # Targets shifted left; the last position predicts nothing.
  targets = jnp.roll(tokens, -1, axis=1)
  weights = jnp.roll(weights.astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
  chunk = min(chunk, length)

  def chunks(x: jax.Array) -> jax.Array:
    """``[B, T, ...]`` → ``[chunks, B, chunk, ...]``, zeros after the end."""
    x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(total: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    hidden, targets, weights = inputs
    return total - jnp.sum(token_log_likelihoods(head(hidden), targets) * weights), None

  total, _ = jax.lax.scan(one, jnp.float32(0.0), (chunks(hidden), chunks(targets), chunks(weights)))
  return total, weights.sum()
