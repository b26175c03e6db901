"""Log-likelihoods of tokens."""

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
