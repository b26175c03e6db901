"""Keys of config.json files: those that change nothing, those that nobody knows, and what transformers heeds."""

import copy
import logging

import pytest

import sa_jax
from sa_jax.formats.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.formats.hf_models import CONFIGS, SIZES, STAND_INS  # noqa: E402

LLAMA = {
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32,
  "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
# Keys that say how large a model is, and those of which some values crash transformers instead of doing nothing.
SIZED = {*SIZES, "head_dim", "layer_types", "rope_parameters", "model_type", "architectures", "dtype", "hidden_act"}
SAID_ELSEWHERE = {
  # transformers' generate heeds them, not its model.
  "eos_token_id", "bos_token_id", "pad_token_id",
  # The config class makes layer_types of it, which lies beside it.
  "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval", "use_sliding_window",
  # They say that the model is another, whatever transformers' class does.
  "is_encoder_decoder", "use_bidirectional_attention",
}  # fmt: skip


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("attention_dropout", 0.1),
    ("pretraining_tp", 2),
    ("gradient_checkpointing", True),
    ("use_mrope", False),
    ("_attn_implementation_autoset", True),
    ("max_sequence_length", 2048),
    ("pad_token_id", -1),
    ("neftune_noise_alpha", 5),
    ("sliding_window", 4096),
    ("tokenizer_padding_side", "right"),
    ("rope_scaling", {"type": "linear", "rope_type": "linear", "factor": 2.0, "finetuned": True}),
  ],
)
def test_inert_keys_are_silent(key, value, caplog):
  sa_jax.ModelConfig.from_hf(LLAMA | {key: value}, strict=True)
  assert not caplog.records


def test_unknown_keys_open_with_one_line_that_lists_all(caplog):
  changes = {"novel": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}}
  with caplog.at_level(logging.WARNING, "sa_jax"):
    found = sa_jax.ModelConfig.from_hf(LLAMA | changes)
  assert found.rope.factor == 2.0
  [record] = caplog.records
  assert "rope_parameters.twist = 3, novel = 1" in record.getMessage()
  with pytest.raises(sa_jax.UserError, match="cannot be used") as caught:
    sa_jax.ModelConfig.from_hf(LLAMA | changes, strict=True)
  assert [line.split(":")[0] for line in str(caught.value).split("\n  ")[1:]] == [
    "rope_parameters.twist = 3",
    "novel = 1",
  ]


def test_a_family_s_own_name_of_a_key_is_named():
  values = LLAMA | {
    "model_type": "internlm3",
    "qkv_bias": "yes",
    "bias": False,
  }
  with pytest.raises(ValueError, match="qkv_bias = 'yes': must be true or false"):
    sa_jax.ModelConfig.from_hf(values)
  with pytest.raises(ValueError, match="conflicts with attention_bias = True; keep one of them"):
    sa_jax.ModelConfig.from_hf(values | {"attention_bias": True, "qkv_bias": False})


def logits(config, weights, tokens):
  """What transformers computes with weights that fit, or None where they do not or it fails."""
  try:
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
      return model(tokens).logits
  except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
    return None


def others(value):
  """Other values that a key might have."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int | float):
    return [value + 1, value * 2.0 + 0.25] if isinstance(value, float) else [value + 1]
  return [True, 3, 0.5] if value is None else []


def read(values):
  """Our config, or None where it is refused."""
  try:
    return sa_jax.ModelConfig.from_hf(values, strict=True)
  except sa_jax.UserError:
    return None


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in STAND_INS])
def test_every_key_of_transformers_class(family):
  """What its model heeds we heed or refuse, and what it ignores does not stop us; new releases' keys too."""
  values = transformers.AutoConfig.for_model(family, **{**SIZES, **CONFIGS[family]}).to_dict()
  torch.manual_seed(0)
  base = transformers.AutoConfig.for_model(**copy.deepcopy(values))
  weights = transformers.AutoModelForCausalLM.from_config(base, attn_implementation="eager").float().state_dict()
  weights = {key: torch.randn(value.shape) for key, value in weights.items()}
  tokens = torch.arange(3, 27)[None]
  expected = logits(base, weights, tokens)
  ours = sa_jax.ModelConfig.from_hf(values | {"dtype": "float32"}, strict=True)
  tried = 0
  for key in sorted(values.keys() - SIZED - SAID_ELSEWHERE):
    for value in others(values[key]):
      try:
        changed = transformers.AutoConfig.for_model(**copy.deepcopy(values) | {key: value})
      except Exception:  # its strict types
        continue
      found = logits(changed, weights, tokens)
      if found is None:
        continue
      config = read(values | {"dtype": "float32", key: value})
      tried += 1
      if not torch.equal(found, expected):
        assert config != ours, f"{key} = {value!r} changes what transformers computes, and not our model"
      else:
        assert config is not None, f"{key} = {value!r} does nothing, and we refuse it"
  assert tried > 5


def test_every_family_has_a_test():
  from tests.formats.hf_models import PUBLISHED

  assert FAMILIES.keys() == CONFIGS.keys() | PUBLISHED.keys()
