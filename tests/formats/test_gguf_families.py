"""GGUF files of every architecture, against the Hugging Face folder of the same weights."""

import re

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import sa_jax
from sa_jax.formats.gguf_architectures import ARCHITECTURES
from sa_jax.formats.gguf_file import GgufFile
from sa_jax.formats.load import describe
from tests.formats import hf_models

OUTER = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
  "model.final_layernorm": "output_norm", "gpt_neox.embed_in": "token_embd",
  "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output", "transformer.word_embeddings": "token_embd",
  "transformer.ln_f": "output_norm",
}  # fmt: skip
GEMMA = {
  "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = {f"self_attn.{name}": f"attn_{name.removesuffix('_proj')}" for name in ("q_proj", "k_proj", "v_proj")} | {
  "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
  "self_attn.qkv_proj": "attn_qkv",
}  # fmt: skip
MLP = {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")} | {"mlp.gate_up_proj": "ffn_up"}
SANDWICH = {
  "input_layernorm": "attn_norm", "post_self_attn_layernorm": "post_attention_norm",
  "post_attention_layernorm": "ffn_norm", "post_mlp_layernorm": "post_ffw_norm",
}  # fmt: skip
POST = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
EXPERTS = {
  "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
} | {f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}  # fmt: skip
EACH = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
OF_4H = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
LOCAL = {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True, False, True]}

# By architecture: the family, what its folder's config says otherwise than the tests', and what llama.cpp's converter
# does with it. A default that a file does not hold must be the model's.
CASES = {
  "llama": ("llama", {"head_dim": 16}, NORMS, True, {}),
  "llama with experts": (
    "mixtral", {"sliding_window": None}, NORMS | EXPERTS, True, {"expert_count": 4, "expert_used_count": 2}
  ),
  "qwen2moe": (
    "qwen2_moe",
    {"use_sliding_window": False},
    NORMS | EXPERTS,
    False,
    {
      "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24,
      "expert_shared_feed_forward_length": 40,
    },
  ),
  "qwen3moe": (
    "qwen3_moe",
    {},
    NORMS | EXPERTS,
    False,
    {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 24},
  ),
  "olmoe": ("olmoe", {}, NORMS | EXPERTS, False, {"expert_count": 4, "expert_used_count": 2}),
  "qwen2": ("qwen2", {"use_sliding_window": False}, NORMS, False, {}),
  "qwen3": ("qwen3", {}, NORMS, False, {}),
  "gemma": ("gemma", {}, NORMS, False, {}),
  "gemma2": (
    "gemma2",
    {"query_pre_attn_scalar": 16},
    GEMMA,
    False,
    {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  ),
  "gemma3": (
    "gemma3_text",
    {
      "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
    GEMMA,
    False,
    {"attention.sliding_window": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
  ),
  "phi3": ("phi3", {}, NORMS, False, {"attention.sliding_window": 10}),
  "seed_oss": ("seed_oss", {}, NORMS | {"post_attention_layernorm": "post_attention_norm"}, False, {}),
  "ernie4_5": ("ernie4_5", {}, NORMS, False, {}),
  "glm4": ("glm4", {}, SANDWICH, False, {"rope.dimension_count": 8}),
  "granite": (
    "granite",
    {},
    NORMS,
    True,
    {"embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.2, "logit_scale": 4.0},
  ),
  "olmo2": ("olmo2", {}, POST, False, {}),
  "olmo2 with a window": (
    "olmo3",
    {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 5e5}}},
    POST,
    False,
    LOCAL,
  ),
  "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, NORMS, True, {}),
  "exaone4": ("exaone4", {}, POST, False, LOCAL),
  "hunyuan-dense": (
    "hunyuan_v1_dense",
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    NORMS | {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
    False,
    {},
  ),
  "command-r": ("cohere", {}, NORMS, False, {"logit_scale": 0.3}),
  "cohere2": ("cohere2", {}, NORMS, False, LOCAL | {"logit_scale": 0.3}),
  "stablelm": ("stablelm", {}, NORMS, False, {"rope.dimension_count": 4, "use_parallel_residual": False}),
  "stablelm in parallel": (
    "stablelm",
    {"use_parallel_residual": True},
    NORMS,
    False,
    {"rope.dimension_count": 4, "use_parallel_residual": True},
  ),
  "phi2": (
    "phi",
    {},
    NORMS | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    False,
    {"rope.dimension_count": 4},
  ),
  "gptneox": (
    "gpt_neox",
    {},
    NORMS | OF_4H | {"attention.dense": "attn_output", "attention.query_key_value": "attn_qkv"},
    False,
    {"rope.dimension_count": 4, "use_parallel_residual": True},
  ),
  "falcon": (
    "falcon",
    {},
    OF_4H
    | {
      "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", "self_attention.dense": "attn_output",
      "self_attention.query_key_value": "attn_qkv",
    },
    False,
    {},
  ),
  "falcon with one norm": (
    "falcon",
    {"new_decoder_architecture": False, "multi_query": True},
    NORMS | OF_4H | {"self_attention.dense": "attn_output", "self_attention.query_key_value": "attn_qkv"},
    False,
    {},
  ),
  "starcoder2": (
    "starcoder2",
    {"sliding_window": None},
    NORMS | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    False,
    {},
  ),
  "nemotron": ("nemotron", {}, NORMS, False, {"rope.dimension_count": 4}),
  "gpt-oss": (
    "gpt_oss",
    {"layer_types": None, "swiglu_limit": 7.0},
    {
      "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
      "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp",
    },
    False,
    {
      "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48, "attention.sliding_window": 8,
      "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
    },
  ),
  "mistral3": (
    "ministral3",
    {},
    NORMS,
    True,
    {
      "attention.temperature_scale": 0.5, "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
      "rope.scaling.original_context_length": 8, "rope.scaling.yarn_log_multiplier": 1.0,
    },
  ),
}  # fmt: skip


ABOUT_ONE = ("gemma", "nemotron")  # norms to whose scales one is added


def swap(weight: np.ndarray, heads: int) -> np.ndarray:
  """Each head's rows from halves to neighbours, one row at a time."""
  size = weight.shape[0] // heads
  return weight[[h * size + side * size // 2 + i for h in range(heads) for i in range(size // 2) for side in (0, 1)]]


def metadata(writer: gguf.GGUFWriter, config: sa_jax.ModelConfig, more: dict) -> None:
  prefix = writer.arch
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_bos_token_id(1)
  writer.add_pad_token_id(0)
  for token in config.eos_token_ids:
    writer.add_eos_token_id(token)
  kinds = {
    int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
    list: writer.add_array,
  }  # fmt: skip
  for key, value in more.items():
    kinds[type(value)](f"{prefix}.{key}", value)


def by_kind(weight: np.ndarray, config: sa_jax.ModelConfig) -> np.ndarray:
  """Rows by group, its queries, key and value, to all queries, then all keys, then all values."""
  size, group = config.head_dim, config.num_heads // config.num_kv_heads + 2
  heads = [weight[start : start + size] for start in range(0, len(weight), size)]
  kinds = [min(head % group - (group - 3), 2) if head % group >= group - 2 else 0 for head in range(len(heads))]
  return np.concatenate([head for kind in range(3) for head, own in zip(heads, kinds, strict=True) if own == kind])


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Each layer's experts in one tensor, and the shared expert's gate without its axis of one."""
  out, experts = {}, {}
  for key, tensor in tensors.items():
    if match := re.fullmatch(r"(model\.layers\.\d+)\..*\.experts\.(\d+)\.(\w+)\.weight", key):
      name = f"{match[1]}.ffn_{EACH[match[3]]}_exps.weight"
      experts.setdefault(name, {})[int(match[2])] = tensor
    else:
      out[key] = tensor[0] if "shared_expert_gate" in key else tensor
  return out | {name: np.stack([each[number] for number in range(len(each))]) for name, each in experts.items()}


def apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """gpt-oss's gates and ups, which alternate, one after the other, and all products by rows."""
  out = {}
  for key, tensor in tensors.items():
    name, end = key.rsplit(".", 1)
    layer = name.removesuffix(".mlp.experts")
    kind = "bias" if end.endswith("_bias") else "weight"
    rows = tensor if kind == "bias" or tensor.ndim < 3 else tensor.swapaxes(1, 2)
    if end.startswith("gate_up_proj"):
      out |= {f"{layer}.ffn_{each}_exps.{kind}": rows[:, start::2] for start, each in enumerate(("gate", "up"))}
    elif end.startswith("down_proj"):
      out[f"{layer}.ffn_down_exps.{kind}"] = rows
    else:
      out[f"{key}.weight" if end == "sinks" else key] = tensor
  return {key: np.ascontiguousarray(tensor) for key, tensor in out.items()}


def convert(folder, path, case, parts=1):
  """The folder as llama.cpp's converter writes it, in one file or in several."""
  _, _, norms, swapped, more = CASES[case]
  config = describe(folder).config
  tensors = load_file(folder / "model.safetensors")
  tensors = (apart if case == "gpt-oss" else stacked)(tensors)
  writer = gguf.GGUFWriter(path, case.split()[0], split_max_tensors=-(-len(tensors) // parts))
  metadata(writer, config, more)
  blocks = ATTENTION | MLP | norms
  for key, tensor in tensors.items():
    name, kind = key.rsplit(".", 1)
    if match := re.fullmatch(r"(?:model\.layers|gpt_neox\.layers|transformer\.h)\.(\d+)\.(.*)", name):
      name = f"blk.{match[1]}.{blocks.get(match[2], match[2])}"
    else:
      name = OUTER[name]
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
      if swapped and name.endswith(f"attn_{letter}"):
        tensor = swap(tensor, heads)
    if name.endswith("attn_qkv") and case.startswith(("gptneox", "falcon")):
      tensor = by_kind(tensor, config)
    if case.startswith(ABOUT_ONE) and name.endswith("norm") and kind == "weight":
      tensor = tensor + 1
    writer.add_tensor(f"{name}.{kind}", tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def build(architecture, tmp_path):
  family, changes, *_ = CASES[architecture]
  hf_models.build(family, tmp_path / "hf", **changes)
  return tmp_path / "hf"


def assert_same_model(path, folder, atol=0.0):
  """The same config and parameters, and so the same logits."""
  ours, found = sa_jax.from_pretrained(path, layout="layers")
  theirs, expected = sa_jax.from_pretrained(folder, layout="layers")
  assert ours.config.architecture == theirs.config.architecture
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("architecture", CASES)
def test_the_model_of_the_folder(architecture, tmp_path):
  folder = build(architecture, tmp_path)
  convert(folder, tmp_path / "model.gguf", architecture)
  # Norms with one added have lost their last bits.
  assert_same_model(tmp_path / "model.gguf", folder, 1e-6 if architecture.startswith(ABOUT_ONE) else 0.0)


def test_every_architecture_has_a_test():
  assert ARCHITECTURES.keys() == {case.split()[0] for case in CASES} | hf_models.PUBLISHED.keys()


INTERNLM2 = {
  "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate",
  "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}  # fmt: skip
SCALED = {"embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 4.0, "rope.scaling.original_context_length": 8}


@pytest.mark.parametrize("family", hf_models.PUBLISHED)
def test_the_published_models(family, tmp_path):
  """Packed rows come apart, and those of queries and keys are swapped."""
  theirs = hf_models.Published(family, tmp_path / "hf")
  model, params = sa_jax.from_pretrained(tmp_path / "hf")
  config = model.config
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
  more = SCALED | {"rope.scaling.attn_factor": config.rope.magnitude} if family == "minicpm" else {}
  metadata(writer, config, more)
  if family == "minicpm":
    for name in ("short", "long"):
      factors = np.array(theirs.config["rope_scaling"][f"{name}_factor"], np.float32)
      writer.add_tensor(f"rope_factors_{name}.weight", factors)
  names = INTERNLM2 if family == "internlm2" else NORMS | ATTENTION | MLP
  outer = OUTER | {"model.tok_embeddings": "token_embd", "output": "output"}
  for key, tensor in theirs.weights.items():
    name, kind = key.rsplit(".", 1)
    parts = {outer.get(name): tensor.numpy()}
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
      parts = {names.get(match[2]): tensor.numpy()}
      if match[2] == "self_attn.W_pack":
        parts = dict(zip(("attn_q", "attn_k", "attn_v"), np.split(tensor.numpy(), 3), strict=True))
      if match[2] == "attention.wqkv":
        cuts = [config.num_heads * config.head_dim, (config.num_heads + config.num_kv_heads) * config.head_dim]
        packed = np.split(by_kind(tensor.numpy(), config), cuts)
        parts = dict(zip(("attn_q", "attn_k", "attn_v"), packed, strict=True))
    for part, array in parts.items():
      heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)
      array = array if heads is None else swap(array, heads)
      writer.add_tensor(f"blk.{match[1]}.{part}.{kind}" if match else f"{part}.{kind}", array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tokens = np.random.default_rng(0).integers(2, 90, (2, 24)).astype(np.int32)
  opened, found = sa_jax.from_pretrained(tmp_path / "model.gguf")
  got, wanted = (each.apply({"params": own}, tokens) for each, own in ((opened, found), (model, params)))
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_parts(tmp_path):
  folder = build("qwen3", tmp_path)
  convert(folder, tmp_path / "model.gguf", "qwen3", parts=3)
  paths = sorted(tmp_path.glob("*.gguf"))
  assert len(paths) >= 3
  assert_same_model(paths[0], folder)
  with pytest.raises(ValueError, match=f"one of {len(paths)} parts; open the first, {paths[0].name}"):
    GgufFile(paths[1])
  paths[-1].rename(tmp_path / "away")
  with pytest.raises(ValueError, match=f"parts are missing .*{paths[-1].name}"):
    GgufFile(paths[0])
  paths[0].with_name(paths[1].name).rename(paths[-1])
  paths[1].write_bytes(paths[-1].read_bytes())
  with pytest.raises(ValueError, match=r"says that it is part \[1, "):
    GgufFile(paths[0])


@pytest.mark.parametrize(
  ("values", "rope"),
  [
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16}, {"attention_factor": None}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 16.0}, {"beta_fast": 16.0}),
    (
      {"type": "yarn", "factor": 4.0, "original_context_length": 16, "attn_factor": 0.5},
      {"attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
    ),
  ],
)
def test_yarn(values, rope, tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
  metadata(writer, sa_jax.ModelConfig.preset("smollm2-135m"), {f"rope.scaling.{key}": values[key] for key in values})
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = sa_jax.ModelConfig.from_hf(GgufFile(tmp_path / "model.gguf").config | {"vocab_size": 8}).rope
  assert (found.scaling, found.factor, found.original_max_length) == ("yarn", 4.0, 16)
  for name, value in rope.items():
    assert getattr(found, name) == (value if value is None else pytest.approx(value))


def test_longrope_and_a_part_of_each_head(tmp_path):
  """Phi-4-mini."""
  short, long = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
  rope = {"type": "longrope", "short_factor": short, "long_factor": long}
  changes = dict(
    hidden_size=64, sliding_window=None, original_max_position_embeddings=16,
    rope_parameters=rope | {"partial_rotary_factor": 0.75, "rope_theta": 1e4},
  )  # fmt: skip
  hf_models.build("phi3", tmp_path / "hf", **changes)
  model = describe(tmp_path / "hf")
  assert (model.config.rope.factor, model.config.rope.fraction) == (4.0, 0.75)
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "phi3")
  metadata(writer, model.config, {})
  writer.add_rope_dimension_count(12)
  writer.add_rope_scaling_orig_ctx_len(16)
  writer.add_sliding_window(0)
  writer.add_rope_scaling_attn_factors(model.config.rope.magnitude)
  writer.add_tensor("rope_factors_short.weight", np.array(short, np.float32))
  writer.add_tensor("rope_factors_long.weight", np.array(long, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = sa_jax.ModelConfig.from_hf(GgufFile(tmp_path / "model.gguf").config | {"vocab_size": 96})
  assert found.rope.magnitude == pytest.approx(model.config.rope.magnitude, rel=1e-6)
  assert (found.rope.short_factors, found.rope.long_factors) == (tuple(short), tuple(long))
  assert (found.rope.fraction, found.head_dim, found.window) == (0.75, 16, None)


QUANTISED = [kind for kind in gguf.GGMLQuantizationType if kind.name not in ("F64", "I8", "I16", "I32", "I64")]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantises(kind, tmp_path):
  size, length = gguf.GGML_QUANT_SIZES[kind]
  data = np.random.default_rng(0).integers(0, 256, (192, 512 // size * length), np.uint8)
  stored = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
  metadata(writer, sa_jax.ModelConfig.preset("smollm2-135m"), {})
  writer.add_tensor("blk.0.attn_v.weight", data.view(stored), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with np.errstate(all="ignore"):
    try:
      expected = gguf.quants.dequantize(data.view(stored), kind)
    except NotImplementedError:
      with pytest.raises(ValueError, match=f"blk.0.attn_v.weight .* is {kind.name}, which the gguf package cannot"):
        GgufFile(tmp_path / "model.gguf")
      return
    np.testing.assert_array_equal(
      GgufFile(tmp_path / "model.gguf").read("model.layers.0.self_attn.v_proj.weight"), expected
    )
