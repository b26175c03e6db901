"""Language models as people's files hold them: inside multimodal ones, under wrappers' names, with tensors beside."""

import itertools
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from tests.formats import hf_models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plain") / "llama"
  hf_models.build("llama", folder, num_hidden_layers=2)
  return folder


def rewritten(folder, to, change, config=None):
  """The folder with other tensors."""
  to.mkdir()
  save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors")
  values = json.loads((folder / "config.json").read_text())
  (to / "config.json").write_text(json.dumps(values | (config or {})))
  return to


def assert_same(left, right):
  ours, theirs = (sa_jax.from_pretrained(folder, layout="layers")[1] for folder in (left, right))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


PREFIXES = {
  "torch.compile": lambda name: "_orig_mod." + name,
  "DistributedDataParallel": lambda name: "module." + name,
  "both": lambda name: "module._orig_mod." + name,
  "multimodal, transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
  "multimodal, transformers 4": lambda name: "language_model." + name,
  "saved without its head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(llama, prefix, tmp_path):
  change = lambda tensors: {PREFIXES[prefix](name): tensor for name, tensor in tensors.items()}
  assert_same(rewritten(llama, tmp_path / "model", change), llama)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_two_names_of_one_tensor(llama, prefix, tmp_path):
  twice = rewritten(llama, tmp_path / "model", lambda tensors: tensors | {f"{prefix}model.norm.weight": np.ones(32)})
  with pytest.raises(ValueError, match="are two names of one tensor, and the files have both"):
    sa_jax.from_pretrained(twice)


BESIDE = {
  "model.rotary_emb.inv_freq": "recomputed from rope_theta",
  "model.layers.1.self_attn.rotary_emb.cos_cached": "recomputed from rope_theta",
  "model.rotary_emb.original_inv_freq": "recomputed from rope_theta",
  "model.visual.blocks.0.attn.qkv.weight": "of another part than the language model",
  "vision_tower.encoder.weight": "of another part than the language model",
  "v_head.weight": "a head of another task",
}


def test_tensors_beside_are_dropped_each_with_its_reason(llama, tmp_path):
  beside = {name: np.ones(4, np.float32) for name in BESIDE}
  folder = rewritten(llama, tmp_path / "model", lambda tensors: tensors | beside)
  assert sa_jax.inspect(folder).dropped == BESIDE
  assert_same(folder, llama)


def test_other_tensors_are_not(llama, tmp_path):
  folder = rewritten(
    llama, tmp_path / "model", lambda tensors: tensors | {"model.novel.weight": np.ones(4, np.float32)}
  )
  with pytest.raises(ValueError, match=r"unknown: model\.novel\.weight \[4\]"):
    sa_jax.from_pretrained(folder)


def test_a_tied_pair_under_the_head_s_name(tmp_path):
  hf_models.build("llama", tmp_path / "plain", num_hidden_layers=2, tie_word_embeddings=True)
  rename = lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name
  change = lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}
  assert_same(rewritten(tmp_path / "plain", tmp_path / "model", change), tmp_path / "plain")


def test_a_tied_head_that_was_rounded(tmp_path):
  hf_models.build("llama", tmp_path / "plain", num_hidden_layers=2, tie_word_embeddings=True)
  rounded = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
  change = lambda tensors: tensors | {"lm_head.weight": rounded(tensors["model.embed_tokens.weight"])}
  assert_same(rewritten(tmp_path / "plain", tmp_path / "model", change), tmp_path / "plain")


TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}


@pytest.mark.parametrize("wrapper", TEXT)
def test_the_text_part_of_a_multimodal_model(wrapper, tmp_path, caplog):
  family = TEXT[wrapper]
  hf_models.build(family, tmp_path / "plain")
  values = json.loads((tmp_path / "plain" / "config.json").read_text())
  inner = values | {"model_type": f"{wrapper}_text" if "vl" in wrapper else family}
  dtype = inner.pop("dtype")
  outer = {
    "model_type": wrapper, "architectures": ["SomethingForConditionalGeneration"], "dtype": dtype, "text_config": inner,
    "vision_config": {"depth": 1}, "image_token_id": 90, "tie_word_embeddings": values.get("tie_word_embeddings"),
  }  # fmt: skip
  inner.pop("tie_word_embeddings", None)
  (tmp_path / "model").mkdir()
  tensors = load_file(tmp_path / "plain" / "model.safetensors")
  tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
  save_file(tensors | {"model.visual.x.weight": np.ones(4, np.float32)}, tmp_path / "model" / "model.safetensors")
  (tmp_path / "model" / "config.json").write_text(json.dumps(outer))
  with caplog.at_level(logging.WARNING, "sa_jax"):
    model = sa_jax.from_pretrained(tmp_path / "model")[0]
  assert (
    f"a {wrapper} has parts besides its language model; only the language model is read, as a {family}" in caplog.text
  )
  assert model.config == sa_jax.from_pretrained(tmp_path / "plain")[0].config
  assert_same(tmp_path / "model", tmp_path / "plain")


WRAPPED = {
  "mistral3": {"model_type": "mistral"},
  "gemma3": {"model_type": "gemma3_text", "tie_word_embeddings": True},
  "qwen2_5_vl": {"model_type": "qwen2_5_vl_text"},
  "qwen3_vl": {"model_type": "qwen3_vl_text"},
  "llava": {"model_type": "llama"},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_heads_are_tied_where_transformers_ties_them(wrapper):
  """The whole model's word comes first, or either one's, by the model."""
  transformers = pytest.importorskip("transformers")
  sizes = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
  }  # fmt: skip
  for outer, inner in itertools.product((True, False), repeat=2):
    config = transformers.AutoConfig.for_model(
      wrapper, text_config=WRAPPED[wrapper] | sizes | {"tie_word_embeddings": inner}, tie_word_embeddings=outer
    )
    values = {
      "model_type": wrapper, "tie_word_embeddings": outer,
      "text_config": WRAPPED[wrapper] | sizes | {"tie_word_embeddings": inner},
    }  # fmt: skip
    assert sa_jax.ModelConfig.from_hf(values).tie_embeddings == config.tie_word_embeddings, (outer, inner)


def test_gemma_3_4b_says_little_of_its_text_part():
  """As its config.json is on the hub."""
  config = sa_jax.ModelConfig.from_hf(
    {
      "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
      "eos_token_id": [1, 106], "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
      "text_config": {
        "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
      },
    },
    strict=True,
  )  # fmt: skip
  assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
  assert (config.rope.factor, config.tie_embeddings, config.eos_token_ids) == (8.0, True, (1, 106))


def test_models_that_share_already():
  with pytest.raises(
    ValueError, match="'gemma4' is not supported: its last layers already reuse the keys and values of earlier"
  ):
    sa_jax.ModelConfig.from_hf({"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]})
