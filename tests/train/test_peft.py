"""Adapters in PEFT's format, both ways, against PEFT itself on torch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from sa_jax import UserError
from sa_jax.train import LoraConfig, init_adapters, load_adapters, merge, save_adapters
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS = np.asarray([[5, 9, 2, 7, 30, 11]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A dense Llama with grouped queries."""
  model = tiny.model("dense", num_layers=3, family="llama")
  return tiny.write_hf(tmp_path_factory.mktemp("peft") / "model", model, tiny.params(model))


def random_adapters(model, layout: str):
  adapters = init_adapters(model, LORA, jax.random.key(1), layout=layout)
  leaves, structure = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return jax.tree.unflatten(structure, [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def test_what_peft_makes_of_ours(folder, tmp_path):
  """Logits of the adapted model on torch, against ours, merged."""
  model, params = sa_jax.from_pretrained(folder, dtype="float32")
  adapters = random_adapters(model, "runs")
  save_adapters(tmp_path / "adapter", model, adapters, LORA, base=str(folder))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
  with torch.no_grad():
    wanted = adapted(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  found = model.apply({"params": merge(params, adapters, LORA)}, TOKENS)
  plain = model.apply({"params": params}, TOKENS)
  assert np.abs(found - plain).max() > 0.1
  np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_what_we_make_of_peft_s(folder, tmp_path):
  """Adapters that PEFT has made of some projections, with rank-stabilised scaling."""
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  how = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False, use_rslora=True
  )
  adapted = peft.get_peft_model(theirs, how).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  with torch.no_grad():
    wanted = adapted(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  model, params = sa_jax.from_pretrained(folder, dtype="float32", layout="layers")
  adapters, config = load_adapters(tmp_path / "adapter", model)
  assert (config.rank, config.targets) == (4, ("q_proj", "o_proj", "up_proj"))
  found = model.apply({"params": sa_jax.stack(merge(params, adapters, config), model.plan)}, TOKENS)
  np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_a_plan_s_adapters_come_back(folder, tmp_path):
  """Followers have none on queries and keys, and those of a dense model's are left out."""
  model, _ = sa_jax.from_pretrained(folder, "0:1", dtype="float32")
  adapters = random_adapters(model, "layers")
  save_adapters(tmp_path / "adapter", model, adapters, LORA)
  loaded, config = load_adapters(tmp_path / "adapter", model)
  assert dataclasses.replace(config, targets=LORA.targets) == LORA
  jax.tree.map(np.testing.assert_array_equal, loaded["layers"], dict(adapters["layers"]))
  dense, _ = sa_jax.from_pretrained(folder, dtype="float32")
  save_adapters(tmp_path / "dense", dense, random_adapters(dense, "layers"), LORA)
  assert "q_proj" not in load_adapters(tmp_path / "dense", model)[0]["layers"]["1"]["attention"]


@pytest.mark.parametrize(
  ("settings", "tensors", "why"),
  [
    ({"use_dora": True, "bias": "all"}, {}, r"use_dora = True is not supported\n  bias = 'all'; must be 'none'"),
    ({"peft_type": "IA3"}, {}, "peft_type = 'IA3'; must be 'LORA'"),
    ({"r": 0}, {}, "r = 0 and lora_alpha = 5.0; must be positive numbers"),
    ({}, {"x": (3, 3)}, "x is not an adapter for a projection of this model"),
    ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (3, 3)}, "is not an adapter for a projection"),
    ({"r": 7}, {}, r"has shape .*; must be \(7, "),
    ({}, {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": None}, "has half of the adapter of mlp up_proj"),
  ],
)
def test_other_adapters(folder, tmp_path, settings, tensors, why):
  model, _ = sa_jax.from_pretrained(folder, dtype="float32")
  save_adapters(tmp_path / "a", model, random_adapters(model, "layers"), LORA)
  file = tmp_path / "a" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))
  held = load_file(tmp_path / "a" / "adapter_model.safetensors")
  held |= {name: np.zeros(shape, np.float32) for name, shape in tensors.items() if shape}
  save_file(
    {name: each for name, each in held.items() if tensors.get(name, each) is not None},
    tmp_path / "a" / "adapter_model.safetensors",
  )
  with pytest.raises(UserError, match=why):
    load_adapters(tmp_path / "a", model)


def test_damaged_weights(folder, tmp_path):
  model, _ = sa_jax.from_pretrained(folder, dtype="float32")
  save_adapters(tmp_path / "a", model, random_adapters(model, "layers"), LORA)
  (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"x" * 20)
  with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
    load_adapters(tmp_path / "a", model)


def test_a_family_that_packs_projections(tmp_path):
  model = tiny.model("dense", num_layers=1, family="phi3", num_kv_heads=2)
  with pytest.raises(UserError, match="phi3 models pack projections into .*qkv_proj.weight, which PEFT adapts as one"):
    save_adapters(tmp_path / "a", model, random_adapters(model, "layers"), LORA)
