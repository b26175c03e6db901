"""The rows of the families' tables: whose checkpoint tensor becomes which parameter."""

from __future__ import annotations

from sa_jax.formats.family import Rule

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


LLAMA = (*_EMBED, *_NORMS, *_QKV, *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)
BAICHUAN = (*_EMBED, *_NORMS, _packed_qkv("self_attn.W_pack.weight"), *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)
_PACKED_GATE_UP = Rule(
  f"{_THEIRS}.mlp.gate_up_proj.weight",
  ((f"{_OURS}/mlp/gate_proj/kernel", "F D -> D F"), (f"{_OURS}/mlp/up_proj/kernel", "F D -> D F")),
)
_SANDWICH_NORMS = (
  _block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  _block("post_self_attn_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  _block("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
  _block("post_mlp_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)
PHI3 = (*_EMBED, *_NORMS, _packed_qkv("self_attn.qkv_proj.weight"), *_OUTPUT, _PACKED_GATE_UP, *_DOWN, *_HEAD)
GLM = (*_EMBED, *_NORMS, *_QKV, *_OUTPUT, _PACKED_GATE_UP, *_DOWN, *_HEAD)
GLM4 = (*_EMBED, *_SANDWICH_NORMS, *_QKV, *_OUTPUT, _PACKED_GATE_UP, *_DOWN, *_HEAD)
INTERNLM2 = (
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
GEMMA = (*_EMBED, *_PRE_AND_POST_NORMS, *_QKV, *_OUTPUT, *_GATE_UP, *_DOWN, *_HEAD)
