"""GGUF files of every architecture, written of a Hugging Face folder as llama.cpp's converter writes them."""

import re

import gguf
import jax
import numpy as np
from safetensors.numpy import load_file

import sa_jax
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


def sizes(writer: gguf.GGUFWriter, config: sa_jax.ModelConfig) -> None:
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)


def metadata(writer: gguf.GGUFWriter, config: sa_jax.ModelConfig, more: dict) -> None:
  prefix = writer.arch
  sizes(writer, config)
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
