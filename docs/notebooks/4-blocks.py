# %% [markdown]
# # 4. Use the blocks in your own model
#
# `AnchorAttention` returns its output and its *state*. `FollowerAttention` takes a state, and only has value and output
# projections. The state is an argument like any other, so it works under `jit`, `grad`, `scan` and rematerialisation,
# and in any model that you write.
#
# This model learns to repeat eight random tokens.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import sa_jax


class Repeater(nn.Module):
  """One anchor, and followers that use its attention weights."""

  config: sa_jax.ModelConfig
  followers: int

  @nn.compact
  def __call__(self, tokens):
    embedding = nn.Embed(self.config.vocab_size, self.config.embed_dim)
    x = embedding(tokens)
    y, state = sa_jax.nn.AnchorAttention(self.config)(nn.RMSNorm()(x))
    x += y
    for _ in range(self.followers):
      x += nn.Dense(self.config.embed_dim)(nn.gelu(nn.Dense(self.config.mlp_dim)(nn.RMSNorm()(x))))
      x += sa_jax.nn.FollowerAttention(self.config)(nn.RMSNorm()(x), state)
    return embedding.attend(nn.RMSNorm()(x))


config = sa_jax.ModelConfig(
  vocab_size=16, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
  dtype="float32", param_dtype="float32",
)  # fmt: skip
model = Repeater(config, followers=1)


def batch(key, rows=64):
  """Rows of eight random tokens, twice."""
  half = jax.random.randint(key, (rows, 8), 0, config.vocab_size)
  return jnp.concatenate([half, half], axis=1)


params = nn.unbox(model.init(jax.random.key(0), batch(jax.random.key(1)))["params"])
sorted(params["AnchorAttention_0"]), sorted(params["FollowerAttention_0"])

# %% [markdown]
# ## Train it
#
# With optax, like any Flax model. The loss is over the second half, which is predictable.

# %%
optimizer = optax.adam(1e-2)


def loss_of(params, tokens):
  """Mean cross-entropy of tokens 8 to 15."""
  logits = model.apply({"params": params}, tokens)[:, 7:-1]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 8:]).mean()


@jax.jit
def step(params, state, key):
  """One step of Adam."""
  loss, gradient = jax.value_and_grad(loss_of)(params, batch(key))
  updates, state = optimizer.update(gradient, state)
  return optax.apply_updates(params, updates), state, loss


state = optimizer.init(params)
losses = []
for key in jax.random.split(jax.random.key(2), 300):
  params, state, loss = step(params, state, key)
  losses.append(float(loss))
print(f"loss {losses[0]:.2f} before, {losses[-1]:.4f} after")

# %%
tokens = batch(jax.random.key(3), rows=1000)
guesses = model.apply({"params": params}, tokens)[:, 7:-1].argmax(-1)
accuracy = float((guesses == tokens[:, 8:]).mean())
print(f"{accuracy:.1%} of the repeated tokens are right")

# %% [markdown]
# ## Below the modules
#
# The state holds the anchor's queries and keys. Any attention function that is called with them and other values *is*
# Shared Attention, so any kernel works, and no weights are stored:

# %%
q, k, v, other = (jax.random.normal(jax.random.key(n), (2, 16, 4, 8)) for n in range(4))
by_state = sa_jax.nn.QueryKey(q, k).attend(other)
by_function = sa_jax.ops.attend(q, k, other)
difference = float(jnp.abs(by_state - by_function).max())
print("largest difference:", difference)

# %% [markdown]
# [Compose with your own JAX](../how-to/composing.md) covers more: your own mask or bias, cross-attention, a custom
# block in the library's transformer, and Flax nnx.
