"""The model families: whose checkpoint tensor becomes which parameter, and what their ``config.json`` says.

A family is data. To add one, write its rows (most are Llama's), the config keys that only it has, and the values that
transformers assumes when its keys are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from sa_jax.ops.rope import RopeScaling


class Rule(NamedTuple):
  """One row of a table: a checkpoint tensor, and the parameter or parameters that it holds.

  Patterns are einops', in the letters V (vocabulary), D (embed), N (heads), K (key/value heads), G (N / K), H (head
  dimension), F (MLP).

  Attributes:
    key: the checkpoint's name; ``{layer}`` stands for the layer's number.
    parts: each parameter's path in the layer layout, and the pattern from the checkpoint's axes to ours. Several parts
      lie behind each other along the first axis.
    view: a pattern applied before that axis is divided, where P is the sum of the parts along it; none when empty.
    when: the field of `ModelConfig` on which the tensor's presence depends, with ``!`` for its negation; always when
      empty.
  """

  key: str
  parts: tuple[tuple[str, str], ...]
  view: str = ""
  when: str = ""


class Key(NamedTuple):
  """A config key that is a field of `ModelConfig`, or several.

  Attributes:
    name: Hugging Face's.
    fields: ours.
    kind: ``flag`` for true or false, ``number`` for a positive number or null.
  """

  name: str
  fields: tuple[str, ...]
  kind: Literal["flag", "number"]


class Family(NamedTuple):
  """What sets a family apart.

  Attributes:
    architecture: the class that transformers, or the checkpoint's own code, loads it with.
    table: its checkpoint's tensors.
    fields: fields of `ModelConfig` that are the same in all its models.
    keys: config keys that only some families have.
    fixed: config keys of which one of these values is implemented.
    required: config keys that must be there, and why.
    defaults: what transformers assumes when a key is absent, where that is not Llama's.
    inert: config keys that change nothing that we compute.
    activation: the config key of the MLP's activation.
    window: ``all`` when ``sliding_window`` is every layer's; ``layers`` when ``layer_types`` says whose it is;
      ``optional`` when so does ``use_sliding_window``.
    is_local: whether a layer is local when there is no ``layer_types``, from the config's values.
    local_rope: whether local layers have a rotary embedding of their own.
    ropes: the rotary scalings that its code has.
  """

  architecture: str
  table: tuple[Rule, ...]
  fields: Mapping[str, Any] = {}
  keys: tuple[Key, ...] = ()
  fixed: Mapping[str, tuple[Any, ...]] = {}
  required: Mapping[str, str] = {}
  defaults: Mapping[str, Any] = {}
  inert: frozenset[str] = frozenset()
  activation: str = "hidden_act"
  window: Literal["", "all", "layers", "optional"] = ""
  is_local: Callable[[Mapping[str, Any], int], bool] | None = None
  local_rope: bool = False
  ropes: tuple[RopeScaling, ...] = ("default", "linear", "dynamic", "yarn", "llama3")


_THEIRS, _OURS = "model.layers.{layer}", "layers/{layer}"
_QUERY, _KEY_VALUE = "(N H) D -> D N H", "(K H) D -> D K H"


def _row(key: str, path: str, axes: str, when: str = "") -> Rule:
  return Rule(key, ((path, axes),), when=when)


def _block(key: str, path: str, axes: str, when: str = "") -> Rule:
  return _row(f"{_THEIRS}.{key}", f"{_OURS}/{path}", axes, when)


_EMBED = (_row("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),)
_HEAD = (
  _row("model.norm.weight", "final_norm/scale", "D -> D"),
  _row("lm_head.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
_QKV = (
  _block("self_attn.q_proj.weight", "attention/q_proj/kernel", _QUERY),
  _block("self_attn.k_proj.weight", "attention/k_proj/kernel", _KEY_VALUE),
  _block("self_attn.v_proj.weight", "attention/v_proj/kernel", _KEY_VALUE),
  _block("self_attn.q_proj.bias", "attention/q_proj/bias", "(N H) -> N H", when="qkv_bias"),
  _block("self_attn.k_proj.bias", "attention/k_proj/bias", "(K H) -> K H", when="qkv_bias"),
  _block("self_attn.v_proj.bias", "attention/v_proj/bias", "(K H) -> K H", when="qkv_bias"),
  _block("self_attn.q_norm.weight", "attention/q_norm/scale", "H -> H", when="qk_norm"),
  _block("self_attn.k_norm.weight", "attention/k_norm/scale", "H -> H", when="qk_norm"),
)
_OUTPUT = (
  _block("self_attn.o_proj.weight", "attention/o_proj/kernel", "D (N H) -> N H D"),
  _block("self_attn.o_proj.bias", "attention/o_proj/bias", "D -> D", when="output_bias"),
)
_GATE_UP = (
  _block("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "F D -> D F"),
  _block("mlp.gate_proj.bias", "mlp/gate_proj/bias", "F -> F", when="mlp_bias"),
  _block("mlp.up_proj.weight", "mlp/up_proj/kernel", "F D -> D F"),
  _block("mlp.up_proj.bias", "mlp/up_proj/bias", "F -> F", when="mlp_bias"),
)
_DOWN = (
  _block("mlp.down_proj.weight", "mlp/down_proj/kernel", "D F -> F D"),
  _block("mlp.down_proj.bias", "mlp/down_proj/bias", "D -> D", when="mlp_bias"),
)
_NORMS = (
  _block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  _block("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
_PRE_AND_POST_NORMS = (
  _block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  _block("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  _block("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> D"),
  _block("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)


def _packed_qkv(key: str, view: str = "", query: str = _QUERY, key_value: str = _KEY_VALUE) -> Rule:
  parts = [(f"{_OURS}/attention/{name}_proj/kernel", query if name == "q" else key_value) for name in "qkv"]
  return Rule(f"{_THEIRS}.{key}", tuple(parts), view)


_LLAMA = (*_EMBED, *_NORMS, *_QKV, *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)
_BAICHUAN = (*_EMBED, *_NORMS, _packed_qkv("self_attn.W_pack.weight"), *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)
_PHI3 = (
  *_EMBED,
  *_NORMS,
  _packed_qkv("self_attn.qkv_proj.weight"),
  *_OUTPUT,
  Rule(
    f"{_THEIRS}.mlp.gate_up_proj.weight",
    ((f"{_OURS}/mlp/gate_proj/kernel", "F D -> D F"), (f"{_OURS}/mlp/up_proj/kernel", "F D -> D F")),
  ),
  *_DOWN,
  *_HEAD,
)
_INTERNLM2 = (
  _row("model.tok_embeddings.weight", "embed/embedding", "V D -> V D"),
  _block("attention_norm.weight", "attention_norm/scale", "D -> D"),
  _block("ffn_norm.weight", "mlp_norm/scale", "D -> D"),
  # Each key/value head's rows: its G query heads, then its key, then its value.
  _packed_qkv("attention.wqkv.weight", "(K P H) D -> P K H D", "G K H D -> D (K G) H", "1 K H D -> D K H"),
  Rule(
    f"{_THEIRS}.attention.wqkv.bias",
    (
      (f"{_OURS}/attention/q_proj/bias", "G K H -> (K G) H"),
      (f"{_OURS}/attention/k_proj/bias", "1 K H -> K H"),
      (f"{_OURS}/attention/v_proj/bias", "1 K H -> K H"),
    ),
    "(K P H) -> P K H",
    when="qkv_bias",
  ),
  _block("attention.wo.weight", "attention/o_proj/kernel", "D (N H) -> N H D"),
  _block("attention.wo.bias", "attention/o_proj/bias", "D -> D", when="output_bias"),
  _block("feed_forward.w1.weight", "mlp/gate_proj/kernel", "F D -> D F"),
  _block("feed_forward.w3.weight", "mlp/up_proj/kernel", "F D -> D F"),
  _block("feed_forward.w2.weight", "mlp/down_proj/kernel", "D F -> F D"),
  _row("model.norm.weight", "final_norm/scale", "D -> D"),
  _row("output.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
_GEMMA = (*_EMBED, *_PRE_AND_POST_NORMS, *_QKV, *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)

_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "output_bias"), "flag")
QUERY_SCALE = "query_pre_attn_scalar"
"""A config key whose inverse square root is the attention scale."""
_GEMMA_FIELDS = {"norm_about_one": True, "post_norms": True, "scale_embeddings": True}
_GEMMA_DEFAULTS = {
  "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
  QUERY_SCALE: 256, "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_GEMMA_INERT = frozenset({"cache_implementation", "_sliding_window_pattern"})
_QWEN_DEFAULTS = {
  "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28,
  "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def _from_max_window_layers(values: Mapping[str, Any], layer: int) -> bool:
  return layer >= values["max_window_layers"]


FAMILIES: dict[str, Family] = {
  "llama": Family(
    "LlamaForCausalLM",
    _LLAMA,
    keys=(_ATTENTION_BIAS, Key("mlp_bias", ("mlp_bias",), "flag")),
    fixed={"sliding_window": (None,)},
  ),
  "mistral": Family(
    "MistralForCausalLM",
    _LLAMA,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    window="all",
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    _LLAMA,
    fields={"qkv_bias": True},
    defaults=_QWEN_DEFAULTS,
    window="optional",
    is_local=_from_max_window_layers,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _LLAMA,
    fields={"qk_norm": True},
    keys=(_ATTENTION_BIAS,),
    defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    window="optional",
    is_local=_from_max_window_layers,
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    _PHI3,
    fixed={"resid_pdrop": (0, 0.0), "embd_pdrop": (0, 0.0)},
    defaults={
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32_000, "pad_token_id": 32_000,
    },
    inert=frozenset({"original_max_position_embeddings"}),
    window="all",
    ropes=("default",),
  ),
  "baichuan": Family(
    "BaichuanForCausalLM",
    _BAICHUAN,
    fields={"normalize_head": True},
    # Baichuan 1 spells it BaiChuan, and has no NormHead.
    fixed={"architectures": (["BaichuanForCausalLM"],)},
    required={"max_position_embeddings": "the 13B models lack it: they use ALiBi, which is not implemented"},
    inert=frozenset({"model_max_length", "_from_model_config", "z_loss_weight", "gradient_checkpointing"}),
    ropes=("default",),
  ),
  "internlm2": Family(
    "InternLM2ForCausalLM",
    _INTERNLM2,
    keys=(Key("bias", ("qkv_bias", "output_bias"), "flag"),),
    ropes=("default", "linear", "dynamic"),
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    _GEMMA,
    fields=_GEMMA_FIELDS,
    keys=(
      _ATTENTION_BIAS,
      Key("final_logit_softcapping", ("logits_softcap",), "number"),
      Key("attn_logit_softcapping", ("attention_softcap",), "number"),
    ),
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    defaults=_GEMMA_DEFAULTS
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    inert=_GEMMA_INERT,
    activation="hidden_activation",
    window="layers",
    is_local=lambda values, layer: layer % 2 == 0,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    _GEMMA,
    fields=_GEMMA_FIELDS | {"qk_norm": True},
    keys=(_ATTENTION_BIAS, Key("final_logit_softcapping", ("logits_softcap",), "number")),
    fixed={
      "hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,), "attn_logit_softcapping": (None,),
    },
    defaults=_GEMMA_DEFAULTS
    | {"max_position_embeddings": 131_072, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    inert=_GEMMA_INERT,
    activation="hidden_activation",
    window="layers",
    is_local=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
    local_rope=True,
  ),
}  # fmt: skip
"""By ``model_type``."""
