"""The head's product and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sa_jax import ops


@pytest.mark.parametrize("axes", ["VD", "DV"])
def test_product_and_gradients_against_numpy(axes):
  rng = np.random.default_rng(0)
  hidden, weights = rng.normal(size=(2, 3, 8)), rng.normal(size=(11, 8))
  wanted = hidden @ weights.T
  given = weights if axes == "VD" else weights.T
  cotangent = rng.normal(size=wanted.shape)
  arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, given, cotangent)]
  found, pull = jax.vjp(lambda hidden, weights: ops.logits(hidden, weights, axes), *arrays[:2])
  d_hidden, d_weights = pull(arrays[2])
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(d_hidden, cotangent @ weights, rtol=1e-5, atol=1e-5)
  table = np.einsum("btv,btd->vd", cotangent, hidden)
  np.testing.assert_allclose(d_weights, table if axes == "VD" else table.T, rtol=1e-5, atol=1e-5)


def test_no_product_reads_float32_where_the_model_computes_in_bfloat16():
  """With float32 operands the two gradients would take as long as everything else in the head, and more."""
  hidden, weights = jnp.zeros((2, 8, 16), jnp.bfloat16), jnp.zeros((32, 16), jnp.float32)
  tokens = jnp.zeros((2, 8), jnp.int32)
  loss = lambda hidden, weights: ops.next_token_loss(lambda x: ops.logits(x, weights, "VD"), hidden, tokens)[0]
  found = products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, weights).jaxpr)
  assert found == [("bfloat16", "bfloat16", "float32")] * 3
  assert [x.dtype for x in jax.grad(loss, argnums=(0, 1))(hidden, weights)] == ["bfloat16", "float32"]


def products(jaxpr):
  """The dtypes of every matrix product's operands and result, those of inner programs too."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(tuple(str(each.aval.dtype) for each in (*equation.invars, *equation.outvars)))
    for inner in jaxprs_in_params(equation.params):
      found += products(inner)
  return found
