"""Checkpoints of mixtures of experts: a tensor each or all in one, read one after the other, and what is missing."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from sa_jax.analysis.refit import Refit
from sa_jax.formats import lazy
from sa_jax.sharding import make_mesh
from sa_jax.train import LoraConfig, abstract_adapters, save_adapters
from tests import tiny
from tests.formats import hf_models

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "granitemoe"])
def spelt(request, tmp_path_factory):
  """A model as transformers writes it for everyone, and as it holds it."""
  folder = tmp_path_factory.mktemp("experts")
  model = hf_models.build(request.param, folder / "usual")
  model.save_pretrained(folder / "stacked", save_original_format=False)
  return folder


def test_experts_in_one_tensor_are_the_same(spelt):
  names = [set(load_file(spelt / each / "model.safetensors")) for each in ("usual", "stacked")]
  assert names[0] != names[1]
  (model, usual), (_, stacked) = (sa_jax.from_pretrained(spelt / each) for each in ("usual", "stacked"))
  tiny.assert_trees_equal(usual, stacked)
  assert model.config.experts.count == 4


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mixtral") / "theirs"
  hf_models.build("mixtral", folder)
  return folder


@pytest.mark.parametrize("sizes", [None, {"expert": 4, "fsdp": 2}])
def test_one_expert_is_read_at_a_time(mixtral, tmp_path, monkeypatch, sizes):
  """From a folder and from our own checkpoint, whatever they are placed on."""
  sa_jax.convert(mixtral, tmp_path / "ours", dtype=None)
  reads = []
  read = lazy.LazyTensor.read

  def spy(self, *args):
    reads.append(part := read(self, *args))
    return part

  monkeypatch.setattr(lazy.LazyTensor, "read", spy)
  mesh = None if sizes is None else make_mesh(**sizes)
  found = [sa_jax.from_pretrained(folder, mesh=mesh)[1] for folder in (mixtral, tmp_path / "ours")]
  tiny.assert_trees_equal(*found)
  assert max(part.size for part in reads) == max(96 * 32, 48 * 32) // (1 if sizes is None else 2)


def test_every_missing_expert_is_listed(mixtral, tmp_path):
  tensors = load_file(mixtral / "model.safetensors")
  lost = [name for name in tensors if ".experts.2." in name or name.endswith("layers.1.block_sparse_moe.gate.weight")]
  assert len(lost) == 7
  (tmp_path / "config.json").write_text((mixtral / "config.json").read_text())
  save_file({name: value for name, value in tensors.items() if name not in lost}, tmp_path / "model.safetensors")
  with pytest.raises(sa_jax.UserError) as caught:
    sa_jax.from_pretrained(tmp_path)
  assert {line.split()[1] for line in str(caught.value).split("\n")[1:]} == set(lost)


def test_another_number_of_experts_than_the_config_says(mixtral, tmp_path):
  sa_jax.convert(mixtral, tmp_path / "ours", dtype=None)
  file = tmp_path / "ours" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"num_local_experts": 3}))
  with pytest.raises(sa_jax.UserError) as caught:
    sa_jax.from_pretrained(tmp_path / "ours")
  wrong = str(caught.value).split("\n  ")[1:]
  assert len(wrong) == len(set(wrong)) == 8
  assert any("experts/gate_proj/kernel is [4, 32, 48], the config says [3, 32, 48]" in line for line in wrong)


def test_what_experts_do_not_do(mixtral, tmp_path):
  model, _ = sa_jax.from_pretrained(mixtral, layout="layers")
  with pytest.raises(sa_jax.UserError, match="W_O is still refitted"):
    Refit(mlp=True).check(model.config)
  config = LoraConfig(rank=2)
  adapters = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_adapters(model, config, layout="layers")
  )
  with pytest.raises(sa_jax.UserError, match="does not support adapters of experts"):
    save_adapters(tmp_path / "all", model, adapters, config)
  save_adapters(tmp_path / "attention", model, adapters, LoraConfig(rank=2, targets=("q_proj", "v_proj")))


def test_cost_tells_active_parameters_apart(mixtral):
  """What is left when the experts that one token does not go through are taken away."""
  model, params = sa_jax.from_pretrained(mixtral)
  found = sa_jax.cost(model.config, None, batch=1, seq_len=8)
  experts = sum(leaf.size for leaf in jax.tree.leaves(params["runs"]["0"]["anchor"]["mlp"]["experts"]))
  assert found.params - found.active_params == experts // 2
  assert sa_jax.cost(model.config, None, batch=1000).decode_bytes > found.decode_bytes + experts // 2 * 4


def test_experts_are_written_one_by_one(mixtral, tmp_path, monkeypatch):
  """Also one whose numbers are all zero, of which a chunk might be left out."""
  tensors = load_file(mixtral / "model.safetensors")
  key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "config.json").write_text((mixtral / "config.json").read_text())
  save_file(tensors | {key: np.zeros_like(tensors[key])}, tmp_path / "theirs" / "model.safetensors")
  whole = []
  read_whole = lazy.LazyTensor.read_whole
  monkeypatch.setattr(lazy.LazyTensor, "read_whole", lambda self: whole.append(self.leading) or read_whole(self))
  sa_jax.convert(tmp_path / "theirs", tmp_path / "ours", dtype=None)
  assert set(whole) == {()}
  tiny.assert_trees_equal(*(sa_jax.from_pretrained(tmp_path / name)[1] for name in ("ours", "theirs")))
