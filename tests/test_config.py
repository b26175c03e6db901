"""Model configs: both spellings of Hugging Face's config.json, presets, and every refusal by name."""

import dataclasses

import pytest

from sa_jax import ModelConfig
from sa_jax.config import Architecture, Compute
from sa_jax.ops import RopeConfig
from tests import tiny

# What transformers 4.31 wrote for Llama-2-7B, and transformers 4.43 for Llama-3.1-8B.
LLAMA_2 = {
  "_name_or_path": "meta-llama/Llama-2-7b-hf",
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 11008,
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.31.0.dev0",
  "use_cache": True,
  "vocab_size": 32000,
}
SCALING = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}
LLAMA_3_ROPE = RopeConfig(
  500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192
)
LLAMA_3_1 = LLAMA_2 | {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009],
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "num_key_value_heads": 8,
  "rope_scaling": SCALING,
  "rope_theta": 500000.0,
  "vocab_size": 128256,
}


def in_v5(values: dict) -> dict:
  """The same config as transformers 5 writes it."""
  kept = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
  rope = {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": "default"} | (values["rope_scaling"] or {})
  return kept | {"rope_parameters": rope, "dtype": values["torch_dtype"], "head_dim": 128}


@pytest.mark.parametrize("spelled", [lambda values: values, in_v5], ids=["v4", "v5"])
class TestFromHf:
  def test_llama_2(self, spelled):
    assert ModelConfig.from_hf(spelled(LLAMA_2)) == ModelConfig.preset("llama-2-7b")

  def test_llama_3_1(self, spelled):
    assert ModelConfig.from_hf(spelled(LLAMA_3_1)) == ModelConfig.preset(
      "llama-3-8b",
      max_length=131072,
      eos_token_ids=(128001, 128008, 128009),
      rope=LLAMA_3_ROPE,
    )


def test_defaults_of_transformers():
  """Values that a config.json may leave out are those of LlamaConfig."""
  sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "model_type")
  found = ModelConfig.from_hf({key: LLAMA_2[key] for key in sizes})
  assert found == ModelConfig(
    vocab_size=32_000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11_008,
    max_length=2048, norm_eps=1e-6, rope=RopeConfig(10_000.0), bos_token_id=1, eos_token_ids=(2,),
  )  # fmt: skip


def test_older_spelling_of_the_scaling():
  """`type` instead of `rope_type`."""
  scaling = {("type" if key == "rope_type" else key): value for key, value in SCALING.items()}
  assert ModelConfig.from_hf(LLAMA_3_1 | {"rope_scaling": scaling}) == ModelConfig.from_hf(LLAMA_3_1)


def test_null_tokens():
  found = ModelConfig.from_hf(LLAMA_2 | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
  assert (found.bos_token_id, found.eos_token_ids, found.pad_token_id) == (None, (), None)


@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize(
  "config",
  [
    tiny.config(),
    tiny.config(tie_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_ids=(2, 3), norm_eps=1e-6),
    tiny.config(rope=dataclasses.replace(LLAMA_3_ROPE, original_max_length=32), eos_token_ids=(2,)),
    *(ModelConfig.preset(name) for name in ("llama-2-7b", "llama-2-13b", "llama-3-8b", "smollm2-135m")),
  ],
)
def test_round_trip(config, spelling):
  values = config.to_hf(spelling)
  assert ("rope_parameters" in values) == (spelling == "v5")
  assert ("torch_dtype" in values) == (spelling == "v4")
  assert ModelConfig.from_hf(values) == config


COMPUTED = {
  "dtype": "float16", "param_dtype": "bfloat16", "cache_dtype": "int8", "attention": "blockwise",
  "attention_state": "attention_weights", "remat": "dots", "group_backward": True,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Compute)])
def test_how_a_model_is_computed_is_not_in_its_config_json(field):
  """A config.json says what the parameters are stored in, and nothing else of `Compute`."""
  config = tiny.config(**{field: COMPUTED[field]})
  back = ModelConfig.from_hf(config.to_hf())
  assert back.architecture == config.architecture
  assert back.compute == Compute(dtype=config.param_dtype, param_dtype=config.param_dtype)


def test_every_field_is_of_one_half():
  halves = [{field.name for field in dataclasses.fields(half)} for half in (Architecture, Compute)]
  assert not halves[0] & halves[1]
  assert halves[0] | halves[1] == {field.name for field in dataclasses.fields(ModelConfig)}


class TestRefused:
  def refuse(self, changes: dict, *messages: str, base: dict = LLAMA_2) -> None:
    with pytest.raises(ValueError, match="config.json cannot be used") as caught:
      ModelConfig.from_hf(base | changes)
    lines = str(caught.value).split("\n  ")[1:]
    assert len(lines) == len(messages)
    for message in messages:
      assert any(line.startswith(message) for line in lines), (message, lines)

  @pytest.mark.parametrize("model_type", ["novel", None])
  def test_model_type(self, model_type):
    with pytest.raises(ValueError, match=f"model_type {model_type!r} is not supported; supported are: .*llama"):
      ModelConfig.from_hf(LLAMA_2 | {"model_type": model_type})

  @pytest.mark.parametrize(
    ("key", "value", "message"),
    [
      ("hidden_act", "mish", "not implemented; must be 'swish' or 'silu' or"),
      ("quantization_config", {"bits": 4}, "the weights are quantised by a method without a name, which is not read"),
      ("is_encoder_decoder", True, "an encoder is not implemented; must be False"),
      ("rope_interleaved", True, "interleaved rotary embedding is not implemented"),
    ],
  )
  def test_value_that_is_not_implemented(self, key, value, message):
    self.refuse({key: value}, f"{key} = {value!r}: {message}")

  @pytest.mark.parametrize(
    ("key", "value", "message"),
    [
      ("vocab_size", 0, "must be a positive integer"),
      ("num_hidden_layers", "32", "must be a positive integer"),
      ("intermediate_size", None, "must be a positive integer"),
      ("max_position_embeddings", True, "must be a positive integer"),
      ("tie_word_embeddings", "yes", "must be true or false"),
      ("attention_bias", 1, "must be true or false"),
      ("rms_norm_eps", -1e-5, "must be a positive number"),
      ("rope_theta", "10000", "must be a positive number"),
      ("num_key_value_heads", 5, "num_attention_heads = 32 must be a multiple of it"),
      ("head_dim", 127, "rotary embedding needs an even number"),
      ("eos_token_id", "2", "must be a token id, a list of token ids or null"),
      ("bos_token_id", "1", "must be a token id or null"),
      ("torch_dtype", "int8", "must be one of float32, bfloat16, float16"),
      ("rope_scaling", 2.0, "must be an object or null"),
    ],
  )
  def test_malformed(self, key, value, message):
    self.refuse({key: value}, f"{key} = {value!r}: {message}")

  @pytest.mark.parametrize("token", [2**40, 2**70, -(2**31) - 1])
  def test_tokens_that_no_array_can_hold(self, token):
    for key, name in (("eos_token_id", "eos_token_ids"), ("bos_token_id",) * 2, ("pad_token_id",) * 2):
      with pytest.raises(ValueError, match=rf"{name}=\(?{token},?\)? \(must be .*a 32-bit integer.*\)"):
        ModelConfig.from_hf(LLAMA_2 | {key: token})

  @pytest.mark.parametrize("key", ["rope_type", "type"])
  def test_rope_type(self, key):
    message = f"rope_parameters.{key} = 'spiral': not implemented for this family; must be 'default' or 'linear'"
    self.refuse({"rope_scaling": {key: "spiral", "factor": 2.0}}, message)

  def test_llama3_without_its_numbers(self):
    missing = ("factor", "low_freq_factor", "high_freq_factor")
    messages = [f"rope_parameters.{key} = None: must be a positive number" for key in missing]
    with pytest.raises(ValueError, match="config.json cannot be used") as caught:
      ModelConfig.from_hf(LLAMA_2 | {"rope_scaling": {"rope_type": "llama3"}})
    assert all(message in str(caught.value) for message in messages)

  def test_two_spellings_that_differ(self):
    """The value of one of them would be silently ignored."""
    self.refuse(
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4}, "rope_theta = 10000.0"
    )
    self.refuse({"dtype": "float32"}, "torch_dtype = 'bfloat16'")

  def test_everything_at_once(self):
    changes = {"hidden_act": "mish", "attention_bias": "no", "vocab_size": -1, "novel": 1}
    known = ("hidden_act = 'mish'", "attention_bias = 'no'", "vocab_size = -1")
    self.refuse(changes, *known)
    with pytest.raises(ValueError, match="config.json cannot be used") as caught:
      ModelConfig.from_hf(LLAMA_2 | changes, strict=True)
    lines = str(caught.value).split("\n  ")[1:]
    assert {line.split(":")[0] for line in lines} == {*known, "novel = 1"}


class TestModelConfig:
  def test_refused_all_at_once(self):
    with pytest.raises(ValueError, match="model config:") as caught:
      tiny.config(vocab_size=0, mlp_dim=1.5, norm_eps=0.0, attention="fast", remat="some")
    for message in (
      "vocab_size=0 (must be a positive integer)",
      "mlp_dim=1.5 (must be an integer)",
      "norm_eps=0.0 (must be a positive number)",
      "attention='fast' (must be one of auto, cudnn, flash, splash, blockwise, reference, chunked",
      "remat='some' (must be one of none, full, attention, dots)",
    ):
      assert message in str(caught.value)

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      ({"num_kv_heads": 3}, "num_heads=4 \\(must be a multiple of num_kv_heads=3\\)"),
      ({"head_dim": 7}, "head_dim=7 \\(must be even for rotary embedding\\)"),
      ({"dtype": "bf16"}, "dtype='bf16' \\(must be one of float32, bfloat16, float16; did you mean bfloat16"),
      ({"param_dtype": "int8"}, "param_dtype='int8' \\(must be one of float32, bfloat16, float16\\)"),
      ({"attention_state": "qk"}, "attention_state='qk' \\(must be query_key or attention_weights\\)"),
    ],
  )
  def test_refused(self, changes, message):
    with pytest.raises(ValueError, match=message):
      tiny.config(**changes)

  def test_presets(self):
    assert ModelConfig.preset("llama-2-7b", remat="full").remat == "full"
    known = "gpt-oss-20b, llama-2-13b, llama-2-7b, llama-3-8b, mixtral-8x7b, smollm2"
    with pytest.raises(ValueError, match=f"no preset 'llama-1'; there are {known}"):
      ModelConfig.preset("llama-1")

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      ({"theta": -1.0}, "rope: theta=-1.0 \\(must be a positive number\\)"),
      ({"factor": 0.0}, "rope: factor=0.0 \\(must be a positive number\\)"),
      ({"scaling": "lineal"}, "rope: scaling='lineal' \\(must be one of default, linear, dynamic, yarn, llama3"),
    ],
  )
  def test_rope_refused(self, changes, message):
    with pytest.raises(ValueError, match=message):
      RopeConfig(**changes)

  def test_sequences_become_tuples(self):
    assert hash(tiny.config(eos_token_ids=[5], local_layers=range(2), window=4)) == hash(
      tiny.config(eos_token_ids=(5,), local_layers=(0, 1), window=4)
    )

  def test_is_a_value(self):
    assert len({tiny.config(), tiny.config(), tiny.config(remat="full")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
      tiny.config().vocab_size = 3
