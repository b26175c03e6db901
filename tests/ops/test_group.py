"""One backward pass for all followers of an anchor, against the reference's gradients."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import ops
from sa_jax.ops.attention import hopper, hopper_kernels
from sa_jax.ops.attention.group import Gathered

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, LAYERS = 2, 300, 4, 2, 16, 3
ROWS = {
  "full": ops.Rows(),
  "padded": ops.Rows(lengths=jnp.asarray([LENGTH, 211])),
  "packed": ops.Rows(segments=jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (BATCH, LENGTH))))),
  "in both directions": ops.Rows(causal=False),
}


def arrays(width: int = WIDTH):
  rng = np.random.default_rng(0)
  shapes = (
    (BATCH, LENGTH, HEADS, WIDTH),
    (BATCH, LENGTH, KV_HEADS, WIDTH),
    (LAYERS, BATCH, LENGTH, KV_HEADS, width),
    (LAYERS, BATCH, LENGTH, HEADS, width),
  )
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def together(rows, spec, q, k, v, seeds):
  """What a group's layers give, each reading the one before it."""
  how = ops.Followers(ops.backends["blockwise"].parts, spec, len(v), v.shape[-1])
  before, taps = 0.0, ops.taps(q, k, rows, how)
  for layer in range(len(v)):
    tap = jax.tree.map(lambda each, layer=layer: each[layer], taps)
    out = ops.follow(q, k, v[layer] + before, tap, rows, how) * seeds[layer]
    before = jnp.tanh(out.mean())
  return out.sum() + before


def apart(rows, spec, q, k, v, seeds):
  """The same, by the reference."""
  before = 0.0
  for layer in range(len(v)):
    out = ops.attend(q, k, v[layer] + before, rows, spec, "reference") * seeds[layer]
    before = jnp.tanh(out.mean())
  return out.sum() + before


@pytest.mark.parametrize("width", [WIDTH, 8])
@pytest.mark.parametrize("spec", [ops.AttentionSpec(), ops.AttentionSpec(window=70, softcap=3.0, scale=0.5)])
@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_the_references(name, spec, width):
  q, k, v, seeds = arrays(width)
  rows = ROWS[name]
  if rows.lengths is not None:
    seeds = jnp.where(jnp.arange(LENGTH)[None, :, None, None] < rows.lengths[:, None, None, None], seeds, 0.0)
  found, expected = (
    jax.jit(jax.value_and_grad(functools.partial(total, rows, spec), argnums=(0, 1, 2)))(q, k, v, seeds)
    for total in (together, apart)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max())), found, expected)


def test_gradients_of_each_example():
  """Under `jax.vmap` an example's taps are its own."""
  q, k, v, seeds = arrays()
  one = lambda total: jax.vmap(jax.grad(functools.partial(total, ops.Rows(), ops.AttentionSpec())))
  examples = lambda x, axis: jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)
  split = examples(q, 0), examples(k, 0), examples(v, 1), examples(seeds, 1)
  np.testing.assert_allclose(one(together)(*split), one(apart)(*split), atol=1e-4)


@pytest.mark.parametrize("jit", [jax.jit, lambda call: call])
def test_derivatives_of_gradients_in_a_direction(jit):
  """Forward over reverse: nothing of q and k is lost on the way."""
  q, k, v, seeds = (x[..., :64, :, :] for x in arrays())
  rows, spec = ops.Rows(), ops.AttentionSpec()

  def along(total):
    gradient = lambda q, k, v: jax.grad(lambda *qkv: jnp.square(total(rows, spec, *qkv, seeds)), argnums=(0, 1, 2))(
      q, k, v
    )
    return jit(lambda *qkv: jax.jvp(gradient, qkv, qkv)[1])(q, k, v)

  def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))

  jax.tree.map(close, along(together), along(apart))


def test_gradients_of_batches_in_lengths_alone():
  """What followers have in common, and a `jax.vmap` has several of, has taps of its own."""
  q, k, v, seeds = arrays()
  seeds = seeds.at[:, :, 100:].set(0.0)
  lengths = jnp.asarray([[100, LENGTH], [LENGTH, 120]])

  def total(of, q, k):
    one = lambda lengths: of(ops.Rows(lengths=lengths), ops.AttentionSpec(), q, k, v, seeds)
    return jax.vmap(one)(lengths).sum()

  found, expected = (jax.jit(jax.grad(functools.partial(total, of), argnums=(0, 1)))(q, k) for of in (together, apart))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max())), found, expected)


def products(jaxpr) -> int:
  """Multiplications in its matrix products, loops counted once."""
  total = 0
  for equation in jaxpr.eqns:
    total += sum(map(products, jax.extend.core.jaxprs_in_params(equation.params)))
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shared = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
      total += int(np.prod(equation.outvars[0].aval.shape) * shared)
  return total


@pytest.mark.parametrize("layers", [2, 7])
def test_a_follower_has_two_products_and_the_group_three_and_one_a_follower(layers):
  """Of a block of scores each: weights and dV a follower; weights, dQ, dK and a wide dP the group; five by itself."""
  q, k, v, seeds = (x[..., :256, :, :] for x in arrays())
  v, seeds = (jnp.repeat(x[:1], layers, axis=0) for x in (v, seeds))

  def plain(rows, spec, q, k, v, seeds):
    return sum((ops.attend(q, k, each, rows, spec, "blockwise") * seed).sum() for each, seed in zip(v, seeds))

  def counted(total):
    forward_and_backward = jax.grad(functools.partial(total, ops.Rows(), ops.AttentionSpec()), argnums=(0, 1, 2))
    return products(jax.make_jaxpr(forward_and_backward)(q, k, v, seeds).jaxpr)

  of_a_product = BATCH * HEADS * 256 * 256 * WIDTH
  forward = 2 * layers
  within_inner = BATCH * HEADS * 256 * WIDTH * layers  # rowsum(dO ∘ O)
  assert counted(plain) == (forward + 5 * layers) * of_a_product + within_inner
  assert counted(together) == (forward + 2 * layers + 3 + layers) * of_a_product + within_inner


def test_kernels_for_hopper_are_lowered_where_there_is_none(monkeypatch):
  """Three stretches of queries among them; what they compute is checked on a GPU (`experiments/efficiency`)."""
  monkeypatch.setattr(hopper, "_SQUARE", 2 * 768 * 256)
  array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
  q, k, statistic = array(1, 768, 4, 128), array(1, 768, 2, 128), array(1, 4, 768, dtype="float32")
  gathered = Gathered(array(5, *q.shape), array(5, *k.shape), statistic, statistic)

  def kernels(part, *arrays):
    of_rows = lambda *arrays: part(*arrays, ops.Rows(), ops.AttentionSpec())
    text = jax.jit(of_rows).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("stablehlo.custom_call @mosaic_gpu")

  assert kernels(hopper.d_values, q, k, statistic, q) == 1
  assert kernels(hopper.d_query_key, q, k, gathered) == 3


@pytest.mark.parametrize(
  ("why", "length", "width", "dtype", "rows", "spec"),
  [
    ("short", 2048, 128, "bfloat16", ops.Rows(), ops.AttentionSpec()),
    ("odd", 4100, 128, "bfloat16", ops.Rows(), ops.AttentionSpec()),
    ("narrow", 4096, 64, "bfloat16", ops.Rows(), ops.AttentionSpec()),
    ("exact", 4096, 128, "float32", ops.Rows(), ops.AttentionSpec()),
    ("padded", 4096, 128, "bfloat16", ops.Rows(lengths=jnp.asarray([3])), ops.AttentionSpec()),
    ("not causal", 4096, 128, "bfloat16", ops.Rows(causal=False), ops.AttentionSpec()),
    ("local", 4096, 128, "bfloat16", ops.Rows(), ops.AttentionSpec(window=64)),
    ("none of these", 4096, 128, "bfloat16", ops.Rows(), ops.AttentionSpec()),
  ],
)
def test_what_the_kernels_take(monkeypatch, why, length, width, dtype, rows, spec):
  q = jax.ShapeDtypeStruct((1, length, 4, width), dtype)
  assert not hopper.takes(q, rows, spec)  # there is no such GPU
  monkeypatch.setattr(hopper.kernels, "is_hopper", lambda: True)
  assert hopper.takes(q, rows, spec) == (why == "none of these")


def test_blocks_of_the_kernels_divide_the_rows_that_they_take():
  assert hopper._MULTIPLE % hopper_kernels.BLOCK == hopper._MULTIPLE % hopper_kernels.WIDE == 0
