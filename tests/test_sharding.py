"""Rules are data: what they make of a mesh of 8 virtual devices, and what they refuse."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from sa_jax.sharding import DEFAULT_RULES, abstract_params, make_mesh, named_sharding, param_shardings
from tests import tiny


def spec(sharding) -> tuple:
  """Mesh axes of each dimension, trailing None left out."""
  axes = tuple(sharding.spec)
  while axes and axes[-1] is None:
    axes = axes[:-1]
  return axes


def test_literal():
  model = tiny.model(vocab_size=64)
  shardings = param_shardings(model, make_mesh(data=2, fsdp=2, tensor=2))
  run = shardings["runs"]["1"]
  assert spec(shardings["embed"]["embedding"]) == ("tensor", "fsdp")
  assert spec(shardings["lm_head"]["kernel"]) == ("fsdp", "tensor")
  assert spec(run["anchor"]["attention"]["q_proj"]["kernel"]) == (None, "fsdp", "tensor")
  assert spec(run["anchor"]["attention"]["k_proj"]["kernel"]) == (None, "fsdp", "tensor")
  assert spec(run["followers"]["attention"]["o_proj"]["kernel"]) == (None, None, "tensor", None, "fsdp")
  assert spec(run["followers"]["mlp"]["down_proj"]["kernel"]) == (None, None, "tensor", "fsdp")
  assert spec(run["followers"]["mlp_norm"]["scale"]) == (None, None, "fsdp")


@pytest.mark.parametrize("layout", ["runs", "layers"])
def test_tree_of_the_parameters(layout):
  model = tiny.model(vocab_size=64)
  shardings = param_shardings(model, make_mesh(fsdp=8), layout=layout)
  params = abstract_params(model, layout=layout)
  assert jax.tree.structure(shardings) == jax.tree.structure(params)
  # embed, which every parameter has, is split in eight.
  for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings)):
    assert sharding.shard_shape(leaf.shape) != leaf.shape
    assert 8 * jax.tree.reduce(lambda a, b: a * b, sharding.shard_shape(leaf.shape), 1) == leaf.size


def test_mesh_of_data_replicates():
  shardings = param_shardings(tiny.model(), make_mesh(data=8))
  for sharding in jax.tree.leaves(shardings):
    assert sharding.mesh.size == 8
  leaf = abstract_params(tiny.model())["embed"]["embedding"]
  assert shardings["embed"]["embedding"].shard_shape(leaf.shape) == leaf.shape


def test_axes_that_do_not_divide():
  """All at once: the vocabulary of 61 and two key/value heads do not split in four."""
  with pytest.raises(ValueError, match="the parameters do not fit the mesh") as caught:
    param_shardings(tiny.model(), make_mesh(fsdp=2, tensor=4), layout="layers")
  lines = str(caught.value).split("\n  ")[1:]
  assert any(line.startswith("embed/embedding: shape [61, 32] is not divisible by") for line in lines)
  assert any(
    line.startswith("layers/0/attention/k_proj/kernel: shape [32, 2, 8] is not divisible by") for line in lines
  )
  # Embedding, head, a k_proj an anchor, a v_proj a layer.
  assert len(lines) == 2 + 3 + 7


def test_two_axes_of_a_parameter_on_one_mesh_axis():
  rules = (("embed", "tensor"), *(rule for rule in DEFAULT_RULES if rule[0] != "embed"))
  with pytest.raises(ValueError, match="the rules map two of its axes .* to one mesh axis") as caught:
    param_shardings(tiny.model(vocab_size=64), make_mesh(tensor=2, data=4), rules, layout="layers")
  assert "layers/0/mlp/up_proj/kernel" in str(caught.value)
  assert "layers/0/mlp_norm/scale" not in str(caught.value)


def test_sizes_that_do_not_make_the_mesh():
  with pytest.raises(ValueError, match="data 3 × fsdp 1 × tensor 1 needs 3 devices; there are 8"):
    make_mesh(data=3)


def test_specs_are_partition_specs():
  for sharding in jax.tree.leaves(param_shardings(tiny.model(), make_mesh(data=8))):
    assert isinstance(sharding.spec, P)


def test_tokens_of_a_row_over_sequence():
  mesh = make_mesh(data=2, sequence=4)
  assert spec(named_sharding(mesh, ("batch", "length"))) == (("data", "fsdp"), "sequence")
  with pytest.raises(ValueError, match="data 1 × fsdp 1 × tensor 1 × sequence 3 needs 3 devices; there are 8"):
    make_mesh(sequence=3)


def test_an_axis_that_the_mesh_lacks_splits_nothing():
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  assert spec(named_sharding(mesh, ("batch", "length", "embed", "heads"))) == ("data", None, None, "tensor")


def test_parameters_read_rules_as_activations_do():
  """The first rule for an axis counts, and an axis without one is not split."""
  mesh, rules = make_mesh(fsdp=4, tensor=2), (("embed", "fsdp"), ("mlp", "tensor"), ("embed", None))
  shardings = param_shardings(tiny.model(), mesh, rules, layout="layers")
  assert spec(shardings["layers"]["0"]["mlp"]["up_proj"]["kernel"]) == ("fsdp", "tensor")
  assert spec(shardings["layers"]["0"]["attention"]["v_proj"]["kernel"]) == ("fsdp",)
  assert spec(named_sharding(mesh, ("embed", "kv_heads"), rules)) == ("fsdp",)
