"""Tiny models of every family, and torch forwards to compare ours with."""

import inspect
import json
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

SIZES = dict(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=None,
  pad_token_id=0,
)

# What each family's config says besides the sizes. Windows are shorter than the texts, and layers differ in kind.
CONFIGS = {
  "llama": dict(attention_bias=True, mlp_bias=True, head_dim=16),
  "mistral": dict(sliding_window=8, head_dim=8),
  "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2, tie_word_embeddings=True),
  "qwen3": dict(head_dim=16),
  "phi3": dict(sliding_window=10),
  "gemma2": dict(sliding_window=8, head_dim=16, query_pre_attn_scalar=24, hidden_size=64),
  "gemma3_text": dict(
    sliding_window=8,
    head_dim=16,
    query_pre_attn_scalar=24,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  ),
  "gemma": dict(head_dim=16),
  "ministral": dict(
    head_dim=16,
    hidden_act="relu",
    sliding_window=8,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
  ),
  "ministral3": dict(
    head_dim=16,
    rope_parameters={
      "type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
      "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
    },
  ),
  "seed_oss": dict(head_dim=16, attention_bias=True, attention_out_bias=False),
  "internlm3": dict(head_dim=16, attention_bias=True, mlp_bias=True),
  "mimo": dict(head_dim=16),
  "ernie4_5": dict(head_dim=16, use_bias=True),
  "helium": dict(head_dim=8, attention_bias=True, hidden_act="gelu"),
  "glm": dict(head_dim=16, eos_token_id=[95]),
  "glm4": dict(head_dim=16, eos_token_id=[95], rms_norm_eps=1e-5),
  "granite": dict(
    attention_bias=True, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2,
    logits_scaling=4.0,
  ),
  "granitemoehybrid": dict(
    embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0,
    num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48, position_embedding_type="rope",
    layer_types=["full_attention"] * 4, mamba_n_heads=8, mamba_d_head=8,
  ),
  "olmo2": dict(),
  "olmo3": dict(
    sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
      "full_attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5,
        "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    },
  ),
  "smollm3": dict(no_rope_layers=[1, 0, 1, 1], attention_bias=True),
  "exaone4": dict(
    head_dim=16, sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
  ),
  "cohere": dict(attention_bias=True, logit_scale=0.3),
  "cohere2": dict(
    sliding_window=8, logit_scale=0.3,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
  ),
  "hunyuan_v1_dense": dict(
    head_dim=16, attention_bias=True,
    rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4},
  ),
  "stablelm": dict(use_qkv_bias=True, partial_rotary_factor=0.5),
  "phi": dict(partial_rotary_factor=0.5),
  "gpt_neox": dict(rotary_pct=0.5, num_key_value_heads=None),
  "falcon": dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48, bias=True),
  "starcoder2": dict(sliding_window=8),
  "nemotron": dict(attention_bias=True, mlp_bias=True),
  "mixtral": dict(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8),
  "qwen2_moe": dict(
    num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=8, max_window_layers=1,
  ),
  "qwen3_moe": dict(
    num_hidden_layers=2, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True,
    head_dim=16, attention_bias=True,
  ),
  "olmoe": dict(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, attention_bias=True),
  "granitemoe": dict(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=3.0,
    residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0,
  ),
  "granitemoeshared": dict(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=3, shared_intermediate_size=40,
    embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0,
    attention_bias=True,
  ),
  "gpt_oss": dict(
    num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8, swiglu_limit=1.5,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"], rms_norm_eps=1e-5,
    rope_parameters={
      "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
      "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    },
  ),
}  # fmt: skip
# Families whose code is another's, which transformers has.
STAND_INS = {"mimo": "qwen2"}
# A plan that each family's pattern of local and global layers allows.
PLANS = (
  dict.fromkeys(CONFIGS, "1:2-3")
  | {"qwen2": "2:3", "gemma2": None, "gemma3_text": "0:1"}
  | dict.fromkeys(("olmo3", "exaone4", "cohere2"), "0:1")
  | {"qwen2_moe": "1:2", "gpt_oss": "1:2"}
  | dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"), "0:1")
)


def build(family, folder, dtype=torch.float32, **changes):
  """A random model, saved by transformers; norms, biases and logits large enough to show every fault."""
  torch.manual_seed(0)
  values = {**SIZES, **CONFIGS[family], **changes}
  config = transformers.AutoConfig.for_model(STAND_INS.get(family, family), **values)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.normal_(std=0.3)
      if "norm" in name and "gemma" not in family:
        parameter.add_(1.0)
  model.save_pretrained(folder)
  if family == "mimo":
    _as_mimo(folder)
  return model


def _as_mimo(folder):
  """The checkpoint of a Qwen 2 as MiMo's, with a layer that predicts a second token."""
  file = folder / "config.json"
  values = json.loads(file.read_text()) | {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
  file.write_text(json.dumps(values | {"attention_bias": True, "num_nextn_predict_layers": 1, "use_mrope": False}))
  file = folder / "model.safetensors"
  save_file(load_file(file) | {"model.mtp_layers.0.input_proj.weight": torch.ones(4, 4)}, file)


def shared_attention(source):
  """An attention function for transformers in which layer ``l`` uses the weights of layer ``source[l]``."""
  weights = {}

  def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    layer = module.layer_idx
    repeats = query.shape[1] // key.shape[1]
    if source[layer] == layer:
      scores = query @ key.repeat_interleave(repeats, 1).mT * scaling
      if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
      scores = scores + attention_mask
      if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
      weights[layer] = torch.softmax(scores, -1)[..., : key.shape[2]]
    out = weights[source[layer]] @ value.repeat_interleave(repeats, 1)
    return out.transpose(1, 2).contiguous(), None

  return attend


class Softmax:
  """The softmax of a model whose code attends by itself: a follower's is its anchor's."""

  dropout = staticmethod(torch.nn.functional.dropout)

  def __init__(self, source):
    self.source, self.weights = source, []

  def softmax(self, scores, dim, dtype):
    layer = len(self.weights)
    anchor = self.source[layer]
    self.weights.append(torch.softmax(scores, dim) if anchor == layer else self.weights[anchor])
    return self.weights[layer]


def logits_under_plan(model, tokens, source):
  """The model's logits when followers use their anchor's attention weights, by the definition."""
  if model.config.model_type == "falcon":
    with torch.no_grad(), mock.patch.object(inspect.getmodule(type(model)), "F", Softmax(source)):
      return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
  transformers.AttentionInterface.register("shared", shared_attention(source))
  transformers.AttentionMaskInterface.register("shared", transformers.masking_utils.eager_mask)
  model.set_attn_implementation("shared")
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
  model.set_attn_implementation("eager")
  return logits


# Baichuan 2, InternLM 2 and MiniCPM are not in transformers: from their published architectures, in torch.

PUBLISHED = {
  "baichuan": dict(num_key_value_heads=None, architectures=["BaichuanForCausalLM"], hidden_act="silu"),
  "internlm2": dict(bias=True, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0}, hidden_act="silu"),
  "minicpm": dict(
    scale_emb=3,
    scale_depth=1.4,
    dim_model_base=8,
    tie_word_embeddings=False,
    hidden_act="silu",
    rope_scaling={
      "type": "longrope",
      "short_factor": [1.0, 1.5, 2.0, 2.5],
      "long_factor": [4.0] * 4,
      "original_max_position_embeddings": 8,
    },
  ),
}


class Published:
  """Baichuan 2 (arXiv 2309.10305: W_pack, NormHead), InternLM 2 (arXiv 2403.17297: wqkv interleaved by group), or
  MiniCPM (arXiv 2404.06395, table 7: scaled embeddings, residuals and head)."""

  def __init__(self, family, folder):
    torch.manual_seed(0)
    self.family = family
    self.config = {**SIZES, "model_type": family, "rms_norm_eps": 1e-6, "torch_dtype": "float32", **PUBLISHED[family]}
    self.config = {key: value for key, value in self.config.items() if value is not None or key == "eos_token_id"}
    self.weights = {name: torch.randn(shape) * 0.3 for name, shape in self.shapes().items()}
    for name in self.weights:
      if "norm" in name:
        self.weights[name] += 1.0
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(self.config))
    save_file(self.weights, folder / "model.safetensors")

  def shapes(self):
    d, f, v = (self.config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = self.config["num_attention_heads"]
    rows = (heads + 2 * self.config.get("num_key_value_heads", heads)) * (d // heads)
    if self.family != "internlm2":
      outer = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
      inner = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
        "self_attn.o_proj.weight": (d, d), "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
      }  # fmt: skip
      parts = {"W_pack": rows} if self.family == "baichuan" else {"q_proj": d, "k_proj": (rows - d) // 2}
      parts |= {} if self.family == "baichuan" else {"v_proj": (rows - d) // 2}
      inner |= {f"self_attn.{name}.weight": (size, d) for name, size in parts.items()}
    else:
      outer = {"model.tok_embeddings.weight": (v, d), "model.norm.weight": (d,), "output.weight": (v, d)}
      inner = {
        "attention_norm.weight": (d,), "ffn_norm.weight": (d,), "attention.wqkv.weight": (rows, d),
        "attention.wqkv.bias": (rows,), "attention.wo.weight": (d, d), "attention.wo.bias": (d,),
        "feed_forward.w1.weight": (f, d), "feed_forward.w3.weight": (f, d), "feed_forward.w2.weight": (d, f),
      }  # fmt: skip
    layers = range(self.config["num_hidden_layers"])
    return outer | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in inner.items()}

  def project(self, x, layer):
    """Queries, keys and values ``[B, heads, T, H]``."""
    config, heads = self.config, self.config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    batch, length, width = x.shape
    head_dim = width // heads
    if self.family == "baichuan":
      packed = x @ self.weights[f"model.layers.{layer}.self_attn.W_pack.weight"].T
      parts = packed.unflatten(-1, (3, width)).unbind(-2)
      return [part.view(batch, length, heads, head_dim).transpose(1, 2) for part in parts]
    if self.family == "minicpm":
      weights = (self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
      return [(x @ weight.T).unflatten(-1, (-1, head_dim)).transpose(1, 2) for weight in weights]
    name = f"model.layers.{layer}.attention.wqkv"
    packed = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
    packed = packed.view(batch, length, kv_heads, heads // kv_heads + 2, head_dim)
    query = packed[..., :-2, :].reshape(batch, length, heads, head_dim)
    return [part.transpose(1, 2) for part in (query, packed[..., -2, :], packed[..., -1, :])]

  def rotate(self, x, length):
    dim = x.shape[-1]
    theta = 1e4
    if self.family == "internlm2" and length > (limit := self.config["max_position_embeddings"]):
      theta *= (2.0 * length / limit - 1.0) ** (dim / (dim - 2))
    stretch = 1.0
    if self.family == "minicpm":
      rope = self.config["rope_scaling"]
      limit = rope["original_max_position_embeddings"]
      stretch = torch.tensor(rope["long_factor" if length > limit else "short_factor"])
    angles = torch.arange(x.shape[2])[:, None] * (1.0 / (stretch * theta ** (torch.arange(0, dim, 2).float() / dim)))
    angles = torch.cat([angles, angles], -1)
    turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    magnitude = (1 + np.log(64 / limit) / np.log(limit)) ** 0.5 if self.family == "minicpm" else 1.0
    return (x * angles.cos() + turned * angles.sin()) * magnitude

  def logits(self, tokens, source):
    weights, baichuan = self.weights, self.family != "internlm2"
    scaled = self.family == "minicpm"
    residual = self.config["scale_depth"] / len(source) ** 0.5 if scaled else 1.0
    names = (
      (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
      )
      if baichuan
      else ("attention_norm", "ffn_norm", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    )
    norm = lambda x, name: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]
    x = weights["model.embed_tokens.weight" if baichuan else "model.tok_embeddings.weight"][
      torch.from_numpy(tokens).long()
    ]
    x = x * self.config["scale_emb"] if scaled else x
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    probs = {}
    for layer, anchor in enumerate(source):
      before, after, out, gate, up, down = (f"model.layers.{layer}.{name}" for name in names)
      q, k, v = self.project(norm(x, before), layer)
      repeats = q.shape[1] // k.shape[1]
      if anchor == layer:
        scores = self.rotate(q, length) @ self.rotate(k, length).repeat_interleave(repeats, 1).mT / q.shape[-1] ** 0.5
        probs[layer] = torch.softmax(scores + mask, -1)
      y = (probs[anchor] @ v.repeat_interleave(repeats, 1)).transpose(1, 2).flatten(2)
      x = x + residual * (y @ weights[f"{out}.weight"].T + weights.get(f"{out}.bias", 0.0))
      h = norm(x, after)
      hidden = torch.nn.functional.silu(h @ weights[f"{gate}.weight"].T) * (h @ weights[f"{up}.weight"].T)
      x = x + residual * (hidden @ weights[f"{down}.weight"].T)
    x = norm(x, "model.norm")
    if scaled:
      return (x / (x.shape[-1] / self.config["dim_model_base"]) @ weights["lm_head.weight"].T).numpy()
    head = torch.nn.functional.normalize(weights["lm_head.weight"]) if baichuan else weights["output.weight"]
    return (x @ head.T).numpy()

  def greedy(self, prompt, new):
    """The likeliest continuation of one prompt, each token from a whole forward pass."""
    tokens = prompt
    for _ in range(new):
      choice = self.logits(tokens, range(self.config["num_hidden_layers"]))[:, -1].argmax(-1)
      tokens = np.concatenate([tokens, choice[:, None].astype(tokens.dtype)], 1)
    return tokens[:, prompt.shape[1] :]
