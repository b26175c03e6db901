"""Out again: bit-exact round trips, and PyTorch running what a plan made."""

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

import sa_jax
from sa_jax.formats.export import WITHOUT_CODE
from tests import tiny
from tests.formats import hf_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(1).integers(2, 90, (2, 20)).astype(np.int32)
FULL = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose plans are tried in every way; of the others, what is likely to differ."""


def tensors(folder):
  return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", [*hf_models.CONFIGS, *hf_models.PUBLISHED])
def test_round_trip_is_exact(family, tmp_path):
  if family in hf_models.PUBLISHED:
    hf_models.Published(family, tmp_path / "theirs")
  else:
    hf_models.build(family, tmp_path / "theirs", torch.bfloat16)
  (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
  sa_jax.convert(tmp_path / "theirs", tmp_path / "ours", dtype=None)
  sa_jax.export(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
  before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
  # Layers that predict further tokens are no part of the model that is read.
  before = {name: value for name, value in before.items() if "mtp_layers" not in name}
  assert before.keys() == after.keys()
  for name, value in before.items():
    assert value.dtype == after[name].dtype
    np.testing.assert_array_equal(value.view(np.uint8), after[name].view(np.uint8), err_msg=name)
  assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
  assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"chat_template": "{{ messages }}"}'
  assert not (tmp_path / "back" / "modeling_shared_attention.py").exists()


def test_dense_export_is_opened_by_transformers(tmp_path):
  theirs = hf_models.build("qwen3", tmp_path / "theirs")
  sa_jax.convert(tmp_path / "theirs", tmp_path / "ours", dtype=None)
  sa_jax.export(tmp_path / "ours", tmp_path / "back")
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
  tokens = torch.from_numpy(TOKENS).long()
  with torch.no_grad():
    np.testing.assert_allclose(back(tokens).logits, theirs(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("family", FULL)
def test_plan_runs_in_pytorch(family, tmp_path):
  hf_models.build(family, tmp_path / "theirs")
  plan = sa_jax.SharingPlan.parse(hf_models.PLANS[family], num_layers=4)
  if family == "llama":
    plan = plan.with_head_maps({3: [2, 0, 3, 3]})
  sa_jax.convert(tmp_path / "theirs", tmp_path / "ours", plan, dtype=None)
  sa_jax.export(tmp_path / "ours", tmp_path / "back")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True).eval()
  model, params = sa_jax.from_pretrained(tmp_path / "ours", layout="layers")
  assert model.plan.followers
  assert not [name for name, _ in theirs.named_parameters() if "layers.3.self_attn.q" in name]
  again, _ = sa_jax.from_pretrained(tmp_path / "back")
  assert (again.plan, again.config) == (model.plan, model.config)

  tokens = torch.from_numpy(TOKENS).long()
  with torch.no_grad():
    logits = theirs(tokens, use_cache=False).logits.numpy()
  np.testing.assert_allclose(model.apply({"params": params}, TOKENS), logits, atol=1e-4)

  # A left-padded batch, with and without a cache.
  mask = np.ones_like(TOKENS)
  mask[0, :7] = 0
  padded = torch.from_numpy(np.where(mask, TOKENS, 0)).long()
  ours = sa_jax.generate(model, params, np.where(mask, TOKENS, 0), attention_mask=mask, max_new_tokens=16).tokens
  options = dict(attention_mask=torch.from_numpy(mask), max_new_tokens=16, do_sample=False, pad_token_id=0)
  with torch.no_grad():
    for cached in (True, False):
      out = theirs.generate(padded, use_cache=cached, return_dict_in_generate=True, **options)
      np.testing.assert_array_equal(out.sequences[:, 20:], ours)
      if cached:
        cache = out["cache" if "cache" in out else "past_key_values"].layers
    for layer in model.plan.followers:
      assert cache[layer].keys.numel() == 0
      assert cache[layer].values.shape[-1] == model.config.head_dim
    for layer in model.plan.anchors:
      assert cache[layer].keys.shape == cache[layer].values.shape


def copied(module, args, kwargs):
  """As accelerate hands arguments to what it has dispatched to devices."""
  return args, {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}


@pytest.mark.parametrize("family", [f for f in hf_models.CONFIGS if f not in FULL and f not in WITHOUT_CODE])
def test_plan_of_every_family_runs_in_pytorch(family, tmp_path):
  """Read at once, and in two parts with a cache."""
  hf_models.build(family, tmp_path / "theirs")
  plan = hf_models.PLANS[family]
  if plan is None:
    pytest.skip("its neighbouring layers differ in kind, so that none shares")
  sa_jax.export(tmp_path / "theirs", tmp_path / "back", plan=plan)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True).eval()
  for module in theirs.model.layers if hasattr(theirs, "model") else ():
    module.register_forward_pre_hook(copied, with_kwargs=True)
  model, params = sa_jax.from_pretrained(tmp_path / "back")
  ours = np.asarray(model.apply({"params": params}, TOKENS))
  tokens = torch.from_numpy(TOKENS).long()
  with torch.no_grad():
    np.testing.assert_allclose(theirs(tokens, use_cache=False).logits, ours, atol=1e-4)
    first = theirs(tokens[:, :12], output_attentions=True)
    assert [each.shape[-1] for each in first.attentions] == [12] * model.config.num_layers
    name = "cache" if "cache" in first else "past_key_values"
    np.testing.assert_allclose(theirs(tokens[:, 12:], **{name: first[name]}).logits, ours[:, 12:], atol=1e-4)


@pytest.mark.parametrize(("family", "plan"), [("llama", "0:1,2:3"), ("qwen2", "dense"), ("phi3", "2:3")])
def test_narrow_values_run_in_pytorch(family, plan, tmp_path):
  """With biases (Qwen 2), and packed and in a window (Phi-3), and cached no wider than they are."""
  hf_models.build(family, tmp_path / "theirs")
  wide, params = sa_jax.from_pretrained(tmp_path / "theirs", plan, layout="layers")
  model = wide.clone(config=dataclasses.replace(wide.config, value_dim=5))
  for block in params["layers"].values():
    block["attention"]["v_proj"] = {name: leaf[..., :5] for name, leaf in block["attention"]["v_proj"].items()}
    block["attention"]["o_proj"]["kernel"] = block["attention"]["o_proj"]["kernel"][:, :5]
  sa_jax.save(tmp_path / "ours", model, params)
  sa_jax.export(tmp_path / "ours", tmp_path / "back")
  sa_jax.save(tmp_path / "filled", wide, tiny.filled(params, wide.config.head_dim))
  sa_jax.export(tmp_path / "filled", tmp_path / "wide")
  assert sa_jax.from_pretrained(tmp_path / "back")[0].config == model.config
  theirs, wide = (
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
    for name in ("back", "wide")
  )
  tokens = torch.from_numpy(TOKENS).long()
  with torch.no_grad():
    logits = theirs(tokens, use_cache=False).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), logits, atol=1e-4)
    precise, of_wide = (each.double()(tokens, use_cache=False).logits for each in (theirs, wide))
    np.testing.assert_allclose(precise, of_wide, atol=1e-5)
    out = theirs.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
  np.testing.assert_array_equal(out.sequences[:, 20:], sa_jax.generate(model, params, TOKENS, max_new_tokens=8).tokens)
  cache = out["cache" if "cache" in out else "past_key_values"].layers
  for layer in range(4):  # transformers' layers with a window keep what they are given
    if layer not in model.config.local_layers:
      assert cache[layer].values.shape[-1] == 5


@pytest.fixture
def exported(tmp_path):
  """A plan of a small Llama, exported straight from its folder, under a narrow umask."""
  hf_models.build("llama", tmp_path / "theirs")
  before = os.umask(0o027)
  try:
    sa_jax.export(tmp_path / "theirs", tmp_path / "out", plan="0:1,2:3")
  finally:
    os.umask(before)
  return tmp_path / "out"


def test_without_its_code_a_plan_does_not_open(exported):
  """The family's own class would make random queries and keys for the followers."""
  with pytest.raises(ValueError, match="trust_remote_code=True"):
    transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
  values = json.loads((exported / "config.json").read_text())
  assert values["model_type"] == "shared_llama"
  assert values["model_type"] not in transformers.CONFIG_MAPPING
  with pytest.raises(ValueError, match="model_type 'shared_llama' is not supported"):  # it is no plan's
    sa_jax.ModelConfig.from_hf({key: value for key, value in values.items() if key != "shared_attention"})


def test_what_goes_with_an_export(exported):
  assert {file.name: oct(file.stat().st_mode & 0o777) for file in exported.iterdir()} == dict.fromkeys(
    [
      "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_shared_attention.py",
    ],
    "0o640",
  )  # fmt: skip
  assert exported.stat().st_mode & 0o777 == 0o750
  card = (exported / "README.md").read_text()
  assert "The plan is `0:1,2:3`." in card
  assert "\nlayers 0-3: o| o|\n" in card
  config = sa_jax.from_pretrained(exported)[0].config
  before, after = (sa_jax.cost(config, plan).kv_bytes_per_token for plan in (None, "0:1,2:3"))
  assert f"| KV cache, bytes per token | {before:,} | {after:,} | -25.0 % |" in card


def test_transformers_knows_where_to_stop(tmp_path):
  model = tiny.model("dense", num_layers=2, bos_token_id=3, eos_token_ids=(5, 7), pad_token_id=0)
  sa_jax.export(tiny.write_hf(tmp_path / "theirs", model, tiny.params(model)), tmp_path / "out")
  told = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  assert (told.bos_token_id, told.eos_token_id, told.pad_token_id) == (3, [5, 7], 0)


def test_what_cannot_be_exported(tmp_path):
  with pytest.raises(ValueError, match=r"there is no config\.json"):
    sa_jax.export(tmp_path, tmp_path / "out")
  hf_models.build("mimo", tmp_path / "mimo")
  with pytest.raises(ValueError, match="a mimo model with followers cannot be exported: transformers has no class"):
    sa_jax.export(tmp_path / "mimo", tmp_path / "out", plan="1:2-3")
  assert not (tmp_path / "out").exists()
