"""The page of the families names them all, and the reasons of the models that are refused are true."""

import re
from pathlib import Path

import pytest

import sa_jax
from sa_jax.formats.export import WITHOUT_CODE
from sa_jax.formats.families import FAMILIES
from sa_jax.formats.gguf_architectures import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ROWS = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_family_has_a_row():
  assert [name for name, _ in ROWS] == list(dict.fromkeys(name for name, _ in ROWS))
  assert {name for name, _ in ROWS} - {"model_type"} == FAMILIES.keys()


def test_every_family_whose_plans_are_not_exported_is_named():
  head = " ".join(PAGE.read_text(encoding="utf-8").split("\n|")[0].split())
  without, narrow = head.split("Narrower values are not supported")
  assert set(re.findall(r"`(\w+)`", without)) - {"model_type"} == set(WITHOUT_CODE)
  assert set(re.findall(r"`(\w+)`", narrow)) == {"falcon", "gpt_neox"}


def test_every_architecture_of_llama_cpp_is_named():
  named = {name for _, column in ROWS for name in re.findall(r"`([^`]*)`", column)}
  assert named == ARCHITECTURES.keys()


@pytest.mark.parametrize(
  ("model_type", "changes", "reason"),
  [
    ("gemma3n_text", {"num_kv_shared_layers": 15}, "already reuse the keys and values"),
    ("gemma4_text", {"num_kv_shared_layers": 0}, "different head dimensions"),
    ("nemotron_h", {"n_routed_experts": 8}, "not attention layers"),
    ("qwen3_5_text", {}, "not attention layers"),
    ("deepseek_v3", {"n_routed_experts": 256}, "latent attention"),
    ("bloom", {}, "ALiBi"),
    ("gpt_bigcode", {}, "learned"),
    ("mllama_text_model", {}, "cross-attention"),
    ("glm4_moe", {"n_routed_experts": 8}, "unsupported kind of mixture"),
    ("falcon", {"alibi": True}, "alibi = True: ALiBi is not implemented"),
    ("hunyuan_v1_dense", {"use_cla": True}, "layers already share keys and values"),
    ("granitemoehybrid", {"layer_types": ["mamba"] * 2, "position_embedding_type": "rope"}, "layer_types"),
    ("minicpm", {"sparse_config": {"topk": 64}}, "sparse attention"),
  ],
)
def test_refusals_say_what_is_computed(model_type, changes, reason):
  values = {
    "model_type": model_type, "architectures": ["AForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
  }  # fmt: skip
  with pytest.raises(sa_jax.UserError, match=re.escape(reason)):
    sa_jax.ModelConfig.from_hf(values | changes)
