"""Rules are data: what they make of a mesh of 8 virtual devices, and what they refuse."""

import dataclasses
import math

import flax.linen
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sa_jax
from sa_jax import UserError
from sa_jax.distributed import checksum, exchange
from sa_jax.mesh import MeshSizes
from sa_jax.sharding import (
  DEFAULT_RULES,
  abstract_params,
  make_mesh,
  mesh_of,
  named_sharding,
  on_mesh,
  param_shardings,
  rules_of,
  rules_on,
)
from tests import tiny


def spec(sharding) -> tuple:
  """Mesh axes of each dimension, trailing None left out."""
  axes = tuple(sharding.spec)
  while axes and axes[-1] is None:
    axes = axes[:-1]
  return axes


def test_one_row_on_a_mesh_of_three_axes(capfd):
  """XLA's words for an array that it can only split otherwise by making it whole, as of a norm's split over `fsdp`."""
  model = tiny.model("0:1", num_layers=2, vocab_size=64, output_bias=True, mlp_bias=True)
  params = tiny.params(model, "runs")
  split = jax.device_put(params, param_shardings(model, make_mesh(data=2, fsdp=2, tensor=2)))
  found, expected = (sa_jax.perplexity(model, each, tiny.tokens(1, 16), batch_size=1) for each in (split, params))
  assert found.loss == pytest.approx(expected.loss, rel=1e-6)
  assert "full rematerialization" not in capfd.readouterr().err


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
  assert spec(run["followers"]["mlp_norm"]["scale"]) == ()  # vectors are whole


@pytest.mark.parametrize("layout", ["runs", "layers"])
def test_tree_of_the_parameters(layout):
  model = tiny.model(vocab_size=64)
  shardings = param_shardings(model, make_mesh(fsdp=8), layout=layout)
  params = abstract_params(model, layout=layout)
  assert jax.tree.structure(shardings) == jax.tree.structure(params)
  # embed, which every matrix has, is split in eight; vectors are whole.
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    ways = 1 if "scale" in jax.tree_util.keystr(path) else 8
    assert ways * math.prod(sharding.shard_shape(leaf.shape)) == leaf.size


def test_mesh_of_data_replicates():
  shardings = param_shardings(tiny.model(), make_mesh(data=8))
  for sharding in jax.tree.leaves(shardings):
    assert sharding.mesh.size == 8
  leaf = abstract_params(tiny.model())["embed"]["embedding"]
  assert shardings["embed"]["embedding"].shard_shape(leaf.shape) == leaf.shape


def test_two_axes_of_a_parameter_on_one_mesh_axis():
  rules = (("embed", "tensor"), *(rule for rule in DEFAULT_RULES if rule[0] != "embed"))
  with pytest.raises(ValueError, match="the rules map two of its axes .* to one mesh axis") as caught:
    param_shardings(tiny.model(vocab_size=64), make_mesh(tensor=2, data=4), rules, layout="layers")
  assert "layers/0/mlp/up_proj/kernel" in str(caught.value)
  assert "layers/0/mlp_norm/scale" not in str(caught.value)


@pytest.mark.parametrize(("name", "axes"), [("length", "tensor"), ("batch", ("data", "tensor"))])
def test_rows_and_heads_on_one_mesh_axis(name, axes):
  rules = ((name, axes), *DEFAULT_RULES)
  with pytest.raises(UserError, match=f"the mesh axis 'tensor' for {name} and heads: split only one of them over it"):
    param_shardings(tiny.model(), make_mesh(data=4, tensor=2), rules)
  param_shardings(tiny.model(), make_mesh(data=8), rules)  # one device along it


def test_sizes_that_do_not_make_the_mesh():
  with pytest.raises(ValueError, match="data 3 × fsdp 1 × tensor 1 needs 3 devices; there are 8"):
    make_mesh(data=3)


def test_specs_are_partition_specs():
  for sharding in jax.tree.leaves(param_shardings(tiny.model(), make_mesh(data=8))):
    assert isinstance(sharding.spec, P)


def test_tokens_of_a_row_over_sequence():
  mesh = make_mesh(data=2, sequence=4)
  assert spec(named_sharding(mesh, ("batch", "length"))) == (("data", "fsdp", "expert"), "sequence")
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


def placed(model, mesh, layout, rules=DEFAULT_RULES):
  """The parameters' shapes with the shardings that the rules make."""
  shardings = param_shardings(model, mesh, rules, layout=layout)
  like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(like, abstract_params(model, layout=layout), shardings)


@pytest.mark.parametrize("layout", ["runs", "layers"])
@pytest.mark.parametrize(
  "sizes",
  [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "sequence": 4}, {"slice": 2, "fsdp": 4}],
  ids=["fsdp", "2x2x2", "sequence", "slice"],
)
def test_parameters_tell_by_which_rules_they_are_split(sizes, layout):
  model, mesh = tiny.model(vocab_size=64), make_mesh(**sizes)
  params = placed(model, mesh, layout)
  assert mesh_of(params) == mesh
  assert rules_of(model.config, params, mesh) == rules_on(mesh)


def test_rules_and_axes_of_ones_own_are_read_off_too():
  mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  model = tiny.model(vocab_size=64)
  split = (("heads", "tp"), ("kv_heads", "tp"), ("mlp", "tp"))
  expected = {"batch": ("dp",), "heads": "tp", "kv_heads": "tp", "mlp": "tp"}
  for more in ({"embed": "dp"}, {"vocab": "tp"}, {}):
    params = placed(model, mesh, "layers", (("batch", "dp"), *split, *more.items()))
    found = {name: entry for name, entry in rules_of(model.config, params, mesh) if entry is not None}
    assert found == expected | more


def test_one_device_is_no_mesh():
  assert mesh_of(tiny.params(tiny.model())) is None
  assert mesh_of(jax.numpy.zeros(3)) is None
  assert mesh_of(jax.device_put(1.0, jax.NamedSharding(make_mesh(devices=jax.devices()[:1]), P()))) is None


def test_meshes_that_cannot_be_used_are_refused_where_a_model_is_opened(tmp_path):
  model = tiny.model("dense", vocab_size=64)
  folder = tiny.write_hf(tmp_path / "model", model, tiny.params(model))
  with pytest.raises(UserError, match=r"data, fsdp are not .*AxisType.Auto.* \* 2\)") as caught:
    sa_jax.from_pretrained(folder, mesh=jax.make_mesh((2, 4), ("data", "fsdp")))
  assert "\n" not in str(caught.value)
  theirs = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with pytest.raises(
    UserError, match=r"it has dp, tp, the rules name data, expert, fsdp, sequence, slice, tensor; .*rules="
  ):
    sa_jax.from_pretrained(folder, mesh=theirs)
  opened, params = sa_jax.from_pretrained(folder, mesh=theirs, rules=(("mlp", "tp"), ("embed", "dp")), layout="layers")
  assert spec(params["layers"]["0"]["mlp"]["up_proj"]["kernel"].sharding) == ("dp", "tp")
  tokens = tiny.tokens(4, 8, 64)
  alone = sa_jax.perplexity(*sa_jax.from_pretrained(folder), tokens, batch_size=4).loss
  assert sa_jax.perplexity(opened, params, tokens, batch_size=4).loss == pytest.approx(alone, rel=1e-5)


def test_what_is_no_mesh_is_refused_where_a_model_is_opened(tmp_path):
  for mesh in ("fsdp=8", 8, make_mesh(fsdp=8).abstract_mesh):
    with pytest.raises(
      UserError, match=r"mesh must be a device mesh, such as sa_jax.sharding.make_mesh\(fsdp=8\), not"
    ):
      sa_jax.from_pretrained(tmp_path, mesh=mesh)
  with pytest.raises(UserError, match="rules need a mesh: give mesh= too"):
    sa_jax.from_pretrained(tmp_path, rules=(("embed", "fsdp"),))


@pytest.mark.parametrize("use", ["perplexity", "generate"])
def test_parameters_on_two_meshes_are_refused(use):
  model = tiny.model("dense", num_layers=2, vocab_size=64)
  meshes = make_mesh(fsdp=4, tensor=2), make_mesh(tensor=2, devices=jax.devices()[:2])
  params, other = (jax.device_put(tiny.params(model), param_shardings(model, mesh, layout="layers")) for mesh in meshes)
  params["layers"]["1"] = other["layers"]["1"]
  with pytest.raises(
    UserError, match=r"layers/1/attention/\w+/kernel is on 2 of the devices, .* a mesh of 8: move all with"
  ):
    getattr(sa_jax, use)(model, params, tiny.tokens(2, 8, 64))


def test_processes_that_have_not_joined_are_told_how(monkeypatch):
  """As on the hosts of a TPU pod, which know of each other from the start."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"one of 2 processes, .* jax.distributed.initialize\(\) .*--multihost"):
    exchange("a question", "mine")


def test_an_axis_that_no_rule_names_is_told(caplog):
  mesh = jax.make_mesh((2, 4), ("data", "stage"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  param_shardings(tiny.model(), mesh)
  assert "no rule uses the mesh axis stage" in caplog.text


def test_a_mesh_is_spelt():
  ones = {"expert": 1, "tensor": 1, "sequence": 1}
  assert dict(MeshSizes.parse("data=2, fsdp=4").mesh().shape) == {"data": 2, "fsdp": 4} | ones
  assert dict(MeshSizes.parse("slice=2,tensor=4").mesh().shape)["slice"] == 2
  assert MeshSizes.parse(" data = 2 , fsdp=4") == MeshSizes(2, 4)
  for text in ("data=2,fsdp", "dat=8", "data=2,data=4", "", "data=٣", "data=" + "9" * 5000, "auto,fsdp=2"):
    with pytest.raises(UserError, match="such as 'data=2,fsdp=4'"):
      MeshSizes.parse(text).mesh()
  with pytest.raises(UserError, match=r"data=0 \(must be at least 1\)"):
    MeshSizes.parse("data=0,fsdp=8")
  with pytest.raises(UserError, match="needs 6 devices; there are 8"):
    MeshSizes.parse("slice=3,fsdp=2").mesh()


@pytest.mark.parametrize(
  ("text", "data"),
  [("auto", 8), ("fsdp=2", 4), ("tensor=8", 1), ("slice=2,fsdp=2", 2), ("data=2,tensor=4", 2), ("data=8", 8)],
)
def test_data_is_what_is_left(text, data):
  sizes = MeshSizes.parse(text)
  assert sizes.over(8).data == sizes.mesh().shape["data"] == data
  assert MeshSizes.parse(str(sizes)) == sizes
  assert sizes.over(8).size == 8


def test_a_mesh_says_how_many_ways_rows_are_split():
  assert MeshSizes(2, 4, tensor=3).ways_spelt == "data × fsdp = 8"
  assert MeshSizes(2, 4, slice=3).ways_spelt == "slice × data × fsdp = 24"


def test_devices_of_a_slice_stay_together():
  """Over `slice` rows are split and no parameter is; the other axes are inside one slice."""
  mesh = make_mesh(slice=2, fsdp=2, tensor=2)
  assert mesh.devices.shape == (2, 1, 2, 1, 2, 1)
  for number, part in enumerate(mesh.devices):
    assert {device.id // 4 for device in part.flat} == {number}
  assert spec(named_sharding(mesh, ("batch", "length"))) == (("slice", "data", "fsdp", "expert"), "sequence")
  for sharding in jax.tree.leaves(param_shardings(tiny.model(vocab_size=64), mesh)):
    assert "slice" not in jax.tree.leaves(tuple(sharding.spec))


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A device of a slice, as far as a mesh asks it."""

  id: int
  slice_index: int
  platform: str = "tpu"
  process_index: int = 0


@pytest.mark.parametrize(("slices", "said"), [(3, 2), (1, 2), (2, 4)])
def test_a_slice_count_that_the_devices_do_not_have(slices, said):
  devices = [Tpu(number, number * said // 12) for number in range(12)]
  with pytest.raises(UserError, match=f"slice={slices}, but the devices belong to {said} slices"):
    make_mesh(slice=slices, fsdp=12 // slices, devices=devices)


def test_a_function_is_traced_anew_under_other_rules():
  mesh, seen = make_mesh(data=2, tensor=4), []

  @jax.jit
  def function(x):
    seen.append(flax.linen.logical_to_mesh_axes(("batch", "embed")))
    return x

  for rules in ((("batch", "tensor"),), (("embed", "tensor"),), (("batch", "tensor"),)):
    with on_mesh(mesh, rules):
      function(1.0)
  assert seen == [P("tensor", None), P(None, "tensor")]


def test_processes_compare_what_a_value_says():
  """All of long arrays, no address of a function or an object, and no order of a set."""

  class Rule:
    pass

  def alike(progress=lambda: None):
    return [np.arange(5000), Rule(), frozenset(map(str, range(20))), progress]

  assert checksum(alike()) == checksum(alike()) == checksum(alike(None))
  long = np.arange(5000)
  assert checksum(long) == checksum(long.copy())
  assert len({checksum(each) for each in (long, np.where(long == 2500, 0, long), long[None], long.tolist())}) == 4
