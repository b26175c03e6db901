"""The rows of the families' tables: which checkpoint tensor becomes which parameter."""

from __future__ import annotations

from sa_jax.formats.family import Rule

_THEIRS, _OURS = "model.layers.{layer}", "layers/{layer}"
_QUERY, _KEY, _VALUE = "(N H) D -> D N H", "(K H) D -> D K H", "(K R) D -> D K R"


def row(key: str, path: str, axes: str, when: str = "") -> Rule:
  """A tensor that is a single parameter."""
  return Rule(key, ((path, axes),), when=when)


def block(key: str, path: str, axes: str, when: str = "") -> Rule:
  """A tensor of each layer, with Llama's name prefix."""
  return row(f"{_THEIRS}.{key}", f"{_OURS}/{path}", axes, when)


EMBED = (row("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),)
HEAD = (
  row("model.norm.weight", "final_norm/scale", "D -> D"),
  row("lm_head.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
PROJECTIONS = (
  block("self_attn.q_proj.weight", "attention/q_proj/kernel", _QUERY),
  block("self_attn.k_proj.weight", "attention/k_proj/kernel", _KEY),
  block("self_attn.v_proj.weight", "attention/v_proj/kernel", _VALUE),
  block("self_attn.q_proj.bias", "attention/q_proj/bias", "(N H) -> N H", when="qkv_bias"),
  block("self_attn.k_proj.bias", "attention/k_proj/bias", "(K H) -> K H", when="qkv_bias"),
  block("self_attn.v_proj.bias", "attention/v_proj/bias", "(K R) -> K R", when="qkv_bias"),
)
_QKV = (
  *PROJECTIONS,
  block("self_attn.q_norm.weight", "attention/q_norm/scale", "H -> H", when="qk_norm"),
  block("self_attn.k_norm.weight", "attention/k_norm/scale", "H -> H", when="qk_norm"),
)
OUTPUT = (
  block("self_attn.o_proj.weight", "attention/o_proj/kernel", "D (N R) -> N R D"),
  block("self_attn.o_proj.bias", "attention/o_proj/bias", "D -> D", when="output_bias"),
)
GATE_UP = (
  block("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "F D -> D F"),
  block("mlp.gate_proj.bias", "mlp/gate_proj/bias", "F -> F", when="mlp_bias"),
  block("mlp.up_proj.weight", "mlp/up_proj/kernel", "F D -> D F"),
  block("mlp.up_proj.bias", "mlp/up_proj/bias", "F -> F", when="mlp_bias"),
)
DOWN = (
  block("mlp.down_proj.weight", "mlp/down_proj/kernel", "D F -> F D"),
  block("mlp.down_proj.bias", "mlp/down_proj/bias", "D -> D", when="mlp_bias"),
)
NORMS = (
  block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  block("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
_PRE_AND_POST_NORMS = (
  block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  block("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  block("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> D"),
  block("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)


def _packed_qkv(key: str, axes: tuple[str, str, str] = (_QUERY, _KEY, _VALUE), view: str = "") -> Rule:
  parts = [(f"{_OURS}/attention/{name}_proj/kernel", each) for name, each in zip("qkv", axes, strict=True)]
  return Rule(f"{_THEIRS}.{key}", tuple(parts), view)


_POST_NORMS = (
  block("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  block("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)
_NORM_TOGETHER = (
  block("self_attn.q_norm.weight", "attention/q_norm/scale", "(N H) -> N H"),
  block("self_attn.k_norm.weight", "attention/k_norm/scale", "(K H) -> K H"),
)
_NORM_ROTATED = (
  block("self_attn.query_layernorm.weight", "attention/q_norm/scale", "H -> H"),
  block("self_attn.key_layernorm.weight", "attention/k_norm/scale", "H -> H"),
)


LLAMA = (*EMBED, *NORMS, *_QKV, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
BAICHUAN = (*EMBED, *NORMS, _packed_qkv("self_attn.W_pack.weight"), *OUTPUT, *GATE_UP, *DOWN, *HEAD)
_PACKED_GATE_UP = Rule(
  f"{_THEIRS}.mlp.gate_up_proj.weight",
  ((f"{_OURS}/mlp/gate_proj/kernel", "F D -> D F"), (f"{_OURS}/mlp/up_proj/kernel", "F D -> D F")),
)
_SANDWICH_NORMS = (
  block("input_layernorm.weight", "attention_norm/scale", "D -> D"),
  block("post_self_attn_layernorm.weight", "attention_post_norm/scale", "D -> D"),
  block("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
  block("post_mlp_layernorm.weight", "mlp_post_norm/scale", "D -> D"),
)
PHI3 = (*EMBED, *NORMS, _packed_qkv("self_attn.qkv_proj.weight"), *OUTPUT, _PACKED_GATE_UP, *DOWN, *HEAD)
GLM = (*EMBED, *NORMS, *_QKV, *OUTPUT, _PACKED_GATE_UP, *DOWN, *HEAD)
GLM4 = (*EMBED, *_SANDWICH_NORMS, *_QKV, *OUTPUT, _PACKED_GATE_UP, *DOWN, *HEAD)
INTERNLM2 = (
  row("model.tok_embeddings.weight", "embed/embedding", "V D -> V D"),
  block("attention_norm.weight", "attention_norm/scale", "D -> D"),
  block("ffn_norm.weight", "mlp_norm/scale", "D -> D"),
  # The rows of each KV head: its G query heads, then its key, then its value.
  _packed_qkv(
    "attention.wqkv.weight", ("G K H D -> D (K G) H", *("1 K H D -> D K H",) * 2), view="(K P H) D -> P K H D"
  ),
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
  block("attention.wo.weight", "attention/o_proj/kernel", "D (N R) -> N R D"),
  block("attention.wo.bias", "attention/o_proj/bias", "D -> D", when="output_bias"),
  block("feed_forward.w1.weight", "mlp/gate_proj/kernel", "F D -> D F"),
  block("feed_forward.w3.weight", "mlp/up_proj/kernel", "F D -> D F"),
  block("feed_forward.w2.weight", "mlp/down_proj/kernel", "D F -> F D"),
  row("model.norm.weight", "final_norm/scale", "D -> D"),
  row("output.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
OLMO = (*EMBED, *_POST_NORMS, *PROJECTIONS, *_NORM_TOGETHER, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
EXAONE4 = (*EMBED, *_POST_NORMS, *_QKV, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
HUNYUAN = (*EMBED, *NORMS, *PROJECTIONS, *_NORM_ROTATED, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
GRANITE_4 = (
  *EMBED,
  *NORMS,
  *PROJECTIONS,
  *OUTPUT,
  Rule(
    f"{_THEIRS}.shared_mlp.input_linear.weight",
    ((f"{_OURS}/mlp/gate_proj/kernel", "F D -> D F"), (f"{_OURS}/mlp/up_proj/kernel", "F D -> D F")),
  ),
  block("shared_mlp.output_linear.weight", "mlp/down_proj/kernel", "D F -> F D"),
  *HEAD,
)
GEMMA = (*EMBED, *_PRE_AND_POST_NORMS, *_QKV, *OUTPUT, *GATE_UP, *DOWN, *HEAD)


def _expert_rows(key: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
  """Rows for experts with separate tensors."""
  return (
    block(f"{key}.experts.{{expert}}.{gate}.weight", "mlp/experts/gate_proj/kernel", "F D -> D F"),
    block(f"{key}.experts.{{expert}}.{up}.weight", "mlp/experts/up_proj/kernel", "F D -> D F"),
    block(f"{key}.experts.{{expert}}.{down}.weight", "mlp/experts/down_proj/kernel", "D F -> F D"),
  )


def _stacked_rows(gate_up: str, down: str) -> tuple[Rule, ...]:
  """Rows for a layer's experts in one tensor: for each expert its gate, followed by its up projection."""
  gate, up, down_to = (f"{_OURS}/mlp/experts/{name}_proj/kernel" for name in ("gate", "up", "down"))
  return (
    Rule(f"{_THEIRS}.{gate_up}", ((gate, "F D -> D F"), (up, "F D -> D F")), stacked=True),
    Rule(f"{_THEIRS}.{down}", ((down_to, "D F -> F D"),), stacked=True),
  )


def _router(key: str) -> Rule:
  return block(key, "mlp/router/kernel", "X D -> D X")


def _alternating(key: str, leaf: str, theirs: str, ours: str) -> Rule:
  """A layer's experts in one tensor, with interleaved gate and up rows per expert."""
  parts = [(f"{_OURS}/mlp/experts/{name}_proj/{leaf}", f"1 {ours} -> {ours}") for name in ("gate", "up")]
  return Rule(f"{_THEIRS}.{key}", tuple(parts), f"{theirs} -> P {ours}", stacked=True)


_SHARED_EXPERT = (
  block("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate_proj/kernel", "S D -> D S", when="experts.shared_width"),
  block("mlp.shared_expert.up_proj.weight", "mlp/shared/up_proj/kernel", "S D -> D S", when="experts.shared_width"),
  block("mlp.shared_expert.down_proj.weight", "mlp/shared/down_proj/kernel", "D S -> S D", when="experts.shared_width"),
  block("mlp.shared_expert_gate.weight", "mlp/shared_gate/kernel", "1 D -> D 1", when="experts.shared_gate"),
)
_SHARED_MLP = (
  Rule(
    f"{_THEIRS}.shared_mlp.input_linear.weight",
    ((f"{_OURS}/mlp/shared/gate_proj/kernel", "S D -> D S"), (f"{_OURS}/mlp/shared/up_proj/kernel", "S D -> D S")),
    when="experts.shared_width",
  ),
  block("shared_mlp.output_linear.weight", "mlp/shared/down_proj/kernel", "D S -> S D", when="experts.shared_width"),
)
_BEFORE_EXPERTS = (*EMBED, *NORMS, *_QKV, *OUTPUT)
_STACKED_EXPERTS = (_router("mlp.gate.weight"), *_stacked_rows("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
_EACH_EXPERT = (_router("mlp.gate.weight"), *_expert_rows("mlp", "gate_proj", "up_proj", "down_proj"))

MIXTRAL = (
  *_BEFORE_EXPERTS,
  _router("block_sparse_moe.gate.weight"),
  *_expert_rows("block_sparse_moe", "w1", "w3", "w2"),
  *HEAD,
)
MIXTRAL_STACKED = (*_BEFORE_EXPERTS, *_STACKED_EXPERTS, *HEAD)
QWEN_MOE = (*_BEFORE_EXPERTS, *_EACH_EXPERT, *_SHARED_EXPERT, *HEAD)
QWEN_MOE_STACKED = (*_BEFORE_EXPERTS, *_STACKED_EXPERTS, *_SHARED_EXPERT, *HEAD)
_BEFORE_OLMOE = (*EMBED, *NORMS, *PROJECTIONS, *_NORM_TOGETHER, *OUTPUT)
OLMOE = (*_BEFORE_OLMOE, *_EACH_EXPERT, *HEAD)
OLMOE_STACKED = (*_BEFORE_OLMOE, *_STACKED_EXPERTS, *HEAD)
GRANITE_MOE = (
  *_BEFORE_EXPERTS,
  _router("block_sparse_moe.router.layer.weight"),
  *_stacked_rows("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
  *_SHARED_MLP,
  *HEAD,
)
GRANITE_MOE_STACKED = (
  *_BEFORE_EXPERTS,
  _router("block_sparse_moe.router.weight"),
  *_stacked_rows("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
  *_SHARED_MLP,
  *HEAD,
)
_BEFORE_GPT_OSS = (
  *_BEFORE_EXPERTS,
  _router("mlp.router.weight"),
  block("mlp.router.bias", "mlp/router/bias", "X -> X"),
)
GPT_OSS = (
  *_BEFORE_GPT_OSS,
  block("self_attn.sinks", "attention/sinks", "N -> N"),
  _alternating("mlp.experts.gate_up_proj", "kernel", "D (F P)", "D F"),
  _alternating("mlp.experts.gate_up_proj_bias", "bias", "(F P)", "F"),
  Rule(f"{_THEIRS}.mlp.experts.down_proj", ((f"{_OURS}/mlp/experts/down_proj/kernel", "F D -> F D"),), stacked=True),
  Rule(f"{_THEIRS}.mlp.experts.down_proj_bias", ((f"{_OURS}/mlp/experts/down_proj/bias", "D -> D"),), stacked=True),
  *HEAD,
)
GPT_OSS_EACH = (
  *_BEFORE_GPT_OSS,
  block("self_attn.sinks.weight", "attention/sinks", "N -> N"),
  *_expert_rows("mlp", "gate_proj", "up_proj", "down_proj"),
  block("mlp.experts.{expert}.gate_proj.bias", "mlp/experts/gate_proj/bias", "F -> F"),
  block("mlp.experts.{expert}.up_proj.bias", "mlp/experts/up_proj/bias", "F -> F"),
  block("mlp.experts.{expert}.down_proj.bias", "mlp/experts/down_proj/bias", "D -> D"),
  *HEAD,
)
