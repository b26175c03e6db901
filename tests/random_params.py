"""Random parameters of any model, made without compiling its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

import sa_jax


def random_params(config, plan, seed=0, layout="layers"):
  """Normal with variance 1 / fan-in, so that activations and scores stay of order one."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("scale"):
      return jnp.asarray(1 + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
    inputs = leaf.shape[0] * leaf.shape[1] if "o_proj" in name else leaf.shape[-1 if "embed" in name else 0]
    return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(inputs), leaf.dtype)

  layers = jax.tree_util.tree_map_with_path(
    draw, sa_jax.sharding.abstract_params(sa_jax.Transformer(config, plan), layout="layers")
  )
  return layers if layout == "layers" else sa_jax.stack(layers, plan)
