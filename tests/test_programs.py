"""What is compiled and not run, and what comes to the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sa_jax
from sa_jax.programs import compiling, fetch, fetch_each, program
from sa_jax.sharding import make_mesh, param_shardings
from tests import tiny


@program(static_argnames="times")
def scaled(x, y, times):
  return x * times + y, x.sum()


def test_shapes_are_compiled_for_their_devices_and_arrays_are_computed():
  sharding = jax.NamedSharding(make_mesh(fsdp=8), P("fsdp"))
  x = jax.ShapeDtypeStruct((16, 2), jnp.float32, sharding=sharding)
  with compiling() as programs:
    first = scaled(x, np.ones((16, 2), np.float32), times=2)
    scaled(x, np.zeros((16, 2), np.float32), times=2)
    scaled(*first, times=3)
    assert np.asarray(scaled(jnp.ones(2), jnp.ones(2), times=2)[0]).tolist() == [3, 3]
  assert [each.name for each in programs] == ["scaled", "scaled"]
  assert (first[0].shape, first[0].dtype, first[0].sharding) == ((16, 2), jnp.float32, sharding)
  assert next(iter(programs)).executable.memory_analysis().argument_size_in_bytes == 2 * (2 * 2 * 4)
  assert fetch((jnp.arange(3), 2))[0].tolist() == [0, 1, 2]
  with pytest.raises(TypeError):
    scaled(x, x, times=2)


def test_a_public_function_compiles_what_it_would_run():
  """Its arguments on a device are what the mesh leaves of the parameters."""
  model, mesh = tiny.model(vocab_size=64), make_mesh(fsdp=4, tensor=2)
  like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  params = jax.tree.map(like, sa_jax.sharding.abstract_params(model), param_shardings(model, mesh))
  with compiling() as programs:
    sa_jax.perplexity(model, params, tiny.tokens(8, 16, 64), batch_size=4)
  (each,) = programs
  held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
  assert held < each.executable.memory_analysis().argument_size_in_bytes <= held + 4 * 16 * 4


def test_each_result_is_fetched_after_the_next_is_dispatched():
  events = []

  def made():
    for number in range(3):
      events.append(f"dispatch {number}")
      yield jnp.full(2, number), [number]

  for array, (number,) in fetch_each(made()):
    events.append(f"fetched {number}")
    np.testing.assert_array_equal(array, [number, number])
    assert isinstance(array, np.ndarray)
  assert events == ["dispatch 0", "dispatch 1", "fetched 0", "dispatch 2", "fetched 1", "fetched 2"]
  assert list(fetch_each(iter(()))) == []
