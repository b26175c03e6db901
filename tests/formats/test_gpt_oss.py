"""gpt-oss: its checkpoints of four bits, its gradients, and whose its sinks are."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.formats import lazy
from sa_jax.formats.load import inspect
from sa_jax.formats.table import entries, pack
from tests import tiny
from tests.formats import hf_models

torch = pytest.importorskip("torch")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

TOKENS = np.random.default_rng(0).integers(2, 90, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gpt_oss") / "theirs"
  return folder, hf_models.build("gpt_oss", folder, hidden_size=64, intermediate_size=32)


@pytest.fixture(scope="module")
def packed(opened, tmp_path_factory):
  """The folder with its experts in four bits, and the model of the weights that transformers makes of them."""
  from safetensors.torch import load_file, save_file

  folder, _ = opened
  rng, stored, meant = np.random.default_rng(1), {}, {}
  for key, tensor in load_file(folder / "model.safetensors").items():
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
      stored[key] = meant[key] = tensor
      continue
    experts, inputs, outputs = tensor.shape
    blocks = torch.from_numpy(rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(122, 127, blocks.shape[:3]).astype(np.uint8))
    stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    meant[key] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
  config = json.loads((folder / "config.json").read_text())
  settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
  folder = tmp_path_factory.mktemp("mxfp4")
  for name, tensors, more in (("packed", stored, {"quantization_config": settings}), ("meant", meant, {})):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config | more))
    save_file(tensors, folder / name / "model.safetensors")
  return folder


def test_four_bits_are_what_transformers_makes_of_them(packed):
  expected, found = (sa_jax.from_pretrained(packed / name)[1] for name in ("meant", "packed"))
  tiny.assert_trees_equal(found, expected)
  in_half = sa_jax.from_pretrained(packed / "packed", dtype="bfloat16")[1]
  experts = lambda tree: tree["runs"]["0"]["anchor"]["mlp"]["experts"]["gate_proj"]["kernel"]
  np.testing.assert_array_equal(experts(in_half).astype(jnp.float32), experts(expected))


def test_one_expert_is_dequantised_at_a_time(packed, monkeypatch, tmp_path):
  reads = []
  read = lazy.LazyTensor.read
  monkeypatch.setattr(lazy.LazyTensor, "read", lambda *args: reads.append(part := read(*args)) or part)
  sa_jax.convert(packed / "packed", tmp_path / "ours", dtype="float32")
  assert max(part.size for part in reads) == 96 * 64
  found, expected = (sa_jax.from_pretrained(folder)[1] for folder in (tmp_path / "ours", packed / "meant"))
  tiny.assert_trees_equal(found, expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda tensors, key: tensors.pop(f"{key}_scales"), "gate_up_proj_scales is missing"),
    (lambda tensors, key: tensors.update({f"{key}_scales": torch.ones(4, 2, 2, dtype=torch.uint8)}), "does not match"),
    (lambda tensors, key: tensors.update({f"{key}_blocks": torch.ones(4, 2, 2, 16)}), "has dtype float32"),
  ],
)
def test_damaged_files_are_refused(change, message, packed, tmp_path):
  from safetensors.torch import load_file, save_file

  tensors = load_file(packed / "packed" / "model.safetensors")
  change(tensors, "model.layers.0.mlp.experts.gate_up_proj")
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text((packed / "packed" / "config.json").read_text())
  with pytest.raises(sa_jax.UserError, match=message):
    sa_jax.from_pretrained(tmp_path)


def test_gradients(opened):
  """Of every parameter, sinks and biases of experts too."""
  folder, theirs = opened
  model, params = sa_jax.from_pretrained(folder, layout="layers")
  gradients = jax.jit(jax.grad(lambda params: jnp.mean(jnp.sin(model.apply({"params": params}, TOKENS)))))(params)
  theirs.zero_grad()
  torch.sin(theirs(torch.from_numpy(TOKENS).long()).logits).mean().backward()
  wanted = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
  parts = {}
  for entry in entries(model.config):
    leaf = gradients
    for name in entry.path:
      leaf = leaf[name]
    parts.setdefault(entry.key, []).append((entry, np.asarray(leaf if entry.expert is None else leaf[entry.expert[0]])))
  assert parts.keys() == wanted.keys()
  for name, own in parts.items():
    found, expected = pack(own), wanted[name]
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected), name


def test_sinks_are_the_anchors(opened, tmp_path):
  """A follower has none, on disk as in memory, and what the plan drops is told."""
  folder, _ = opened
  assert inspect(folder, "1:2").dropped["model.layers.2.self_attn.sinks"] == "layer 2 follows layer 1"
  params = sa_jax.from_pretrained(folder, "1:2", layout="layers")[1]
  assert ["sinks" in params["layers"][str(layer)]["attention"] for layer in range(3)] == [True, True, False]
  sa_jax.convert(folder, tmp_path / "ours", "1:2", dtype=None)
  tiny.assert_trees_equal(sa_jax.from_pretrained(tmp_path / "ours", layout="layers")[1], params)
  with pytest.raises(sa_jax.UserError, match="makes layers .2. anchors"):
    sa_jax.from_pretrained(tmp_path / "ours", "dense")


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_cached_steps_agree_with_whole_rows(opened, cache_dtype):
  model, params = sa_jax.from_pretrained(opened[0], "1:2", layout="layers")
  expected = jax.jit(lambda params: model.apply({"params": params}, TOKENS))(params)
  model = model.clone(config=dataclasses.replace(model.config, cache_dtype=cache_dtype))
  lengths = jnp.full(2, 20, jnp.int32)
  prefill = jax.jit(lambda params: model.apply({"params": params}, TOKENS[:, :20], lengths, method=model.prefill))
  _, cache = prefill(params)
  cache = cache.grow(24)
  step = jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=model.step))
  for position in range(20, 24):
    found, cache = step(params, jnp.asarray(TOKENS[:, position]), cache, jnp.full(2, position, jnp.int32))
    # Rounded keys may choose other experts.
    most = 1e-5 if cache_dtype is None else 0.3
    assert np.linalg.norm(found - expected[:, position]) <= most * np.linalg.norm(expected[:, position])


def test_what_its_config_says_where_it_says_nothing():
  """As transformers reads it."""
  transformers = pytest.importorskip("transformers")
  values = {"model_type": "gpt_oss"} | {name: hf_models.SIZES[name] for name in ("vocab_size", "hidden_size")}
  values |= {"num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 48}
  found = sa_jax.ModelConfig.from_hf(values)
  theirs = transformers.AutoConfig.for_model(**values)
  assert (found.experts.count, found.experts.chosen) == (theirs.num_local_experts, theirs.num_experts_per_tok)
  assert (found.window, found.mlp_clamp, found.head_dim) == (128, theirs.swiglu_limit, theirs.head_dim)
  assert found.local_layers == tuple(
    layer for layer, kind in enumerate(theirs.layer_types) if kind == "sliding_attention"
  )
  rope = theirs.rope_parameters
  assert (found.rope.scaling, found.rope.factor, found.rope.truncate) == (rope["rope_type"], rope["factor"], False)
  assert found.rope.theta == rope["rope_theta"]
  assert (found.qkv_bias, found.output_bias, found.mlp_bias, found.sinks) == (True,) * 4


@pytest.mark.parametrize(
  ("model_type", "counts", "message"),
  [
    (
      "mixtral",
      {"num_local_experts": 8, "num_experts": 4},
      "num_experts = 4: conflicts with num_local_experts = 8; keep one",
    ),
    (
      "qwen3_moe",
      {"num_local_experts": 8, "num_experts": 4},
      "num_local_experts = 8: conflicts with num_experts = 4; keep one",
    ),
    ("gpt_oss", {"num_experts": 6}, None),
    ("qwen2_moe", {"num_local_experts": 6}, None),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5: another SwiGLU coefficient"),
  ],
)
def test_how_many_experts_a_config_says(model_type, counts, message):
  sizes = {name: hf_models.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
  values = {"model_type": model_type, "num_hidden_layers": 2, "num_attention_heads": 16} | sizes | counts
  if message is None:
    assert sa_jax.ModelConfig.from_hf(values).experts.count == 6
    return
  with pytest.raises(sa_jax.UserError, match=message):
    sa_jax.ModelConfig.from_hf(values)
