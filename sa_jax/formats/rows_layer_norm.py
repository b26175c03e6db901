"""The rows of the families with layer norm; see `sa_jax.formats.rows`."""

from __future__ import annotations

from sa_jax.formats.family import Rule
from sa_jax.formats.rows import DOWN, EMBED, GATE_UP, HEAD, NORMS, OUTPUT, PROJECTIONS, row

_OURS = "layers/{layer}"


def _linear(key: str, path: str, axes: str, bias: str, when: str) -> tuple[Rule, Rule]:
  """A projection of each layer, with its bias."""
  return row(f"{key}.weight", f"{_OURS}/{path}/kernel", axes), row(f"{key}.bias", f"{_OURS}/{path}/bias", bias, when)


def _norm(key: str, path: str, when: str = "") -> tuple[Rule, Rule]:
  """A norm with a bias."""
  return row(f"{key}.weight", f"{path}/scale", "D -> D", when), row(f"{key}.bias", f"{path}/bias", "D -> D", when)


def _plain_mlp(up: str, down: str) -> tuple[Rule, ...]:
  return (
    *_linear(up, "mlp/up_proj", "F D -> D F", "F -> F", "mlp_bias"),
    *_linear(down, "mlp/down_proj", "D F -> F D", "D -> D", "mlp_bias"),
  )


def _output(key: str) -> tuple[Rule, ...]:
  return _linear(key, "attention/o_proj", "D (N R) -> N R D", "D -> D", "output_bias")


def _packed(key: str) -> tuple[Rule, Rule]:
  """Packed queries, keys and values: the rows of each KV head are its G query heads, then its key, then its value."""
  parts = lambda leaf, query, key_value: tuple(
    (f"{_OURS}/attention/{name}_proj/{leaf}", query if name == "q" else key_value) for name in "qkv"
  )
  return (
    Rule(f"{key}.weight", parts("kernel", "G K H D -> D (K G) H", "1 K H D -> D K H"), "(K P H) D -> P K H D"),
    Rule(f"{key}.bias", parts("bias", "G K H -> (K G) H", "1 K H -> K H"), "(K P H) -> P K H", when="qkv_bias"),
  )


_LAYER = "model.layers.{layer}"
_BIASED_NORMS = (
  *_norm(f"{_LAYER}.input_layernorm", f"{_OURS}/attention_norm"),
  *_norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}/mlp_norm", "!shared_norm"),
  row("model.norm.bias", "final_norm/bias", "D -> D"),
)

COHERE = (*EMBED, NORMS[0], *PROJECTIONS, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
STABLELM = (*EMBED, *_BIASED_NORMS, *PROJECTIONS, *OUTPUT, *GATE_UP, *DOWN, *HEAD)
PHI = (
  *EMBED,
  *_norm(f"{_LAYER}.input_layernorm", f"{_OURS}/attention_norm"),
  *PROJECTIONS,
  *_output(f"{_LAYER}.self_attn.dense"),
  *_plain_mlp(f"{_LAYER}.mlp.fc1", f"{_LAYER}.mlp.fc2"),
  *_norm("model.final_layernorm", "final_norm"),
  row("lm_head.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
  row("lm_head.bias", "lm_head/bias", "V -> V", when="head_bias"),
)
_NEOX = "gpt_neox.layers.{layer}"
GPT_NEOX = (
  row("gpt_neox.embed_in.weight", "embed/embedding", "V D -> V D"),
  *_norm(f"{_NEOX}.input_layernorm", f"{_OURS}/attention_norm"),
  *_norm(f"{_NEOX}.post_attention_layernorm", f"{_OURS}/mlp_norm"),
  *_packed(f"{_NEOX}.attention.query_key_value"),
  *_output(f"{_NEOX}.attention.dense"),
  *_plain_mlp(f"{_NEOX}.mlp.dense_h_to_4h", f"{_NEOX}.mlp.dense_4h_to_h"),
  *_norm("gpt_neox.final_layer_norm", "final_norm"),
  row("embed_out.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
_FALCON = "transformer.h.{layer}"
FALCON = (
  row("transformer.word_embeddings.weight", "embed/embedding", "V D -> V D"),
  *_norm(f"{_FALCON}.input_layernorm", f"{_OURS}/attention_norm", "shared_norm"),
  *_norm(f"{_FALCON}.input_layernorm", f"{_OURS}/attention_norm", "!parallel"),
  *_norm(f"{_FALCON}.post_attention_layernorm", f"{_OURS}/mlp_norm", "!parallel"),
  *_norm(f"{_FALCON}.ln_attn", f"{_OURS}/attention_norm", "parallel !shared_norm"),
  *_norm(f"{_FALCON}.ln_mlp", f"{_OURS}/mlp_norm", "parallel !shared_norm"),
  *_packed(f"{_FALCON}.self_attention.query_key_value"),
  *_output(f"{_FALCON}.self_attention.dense"),
  *_plain_mlp(f"{_FALCON}.mlp.dense_h_to_4h", f"{_FALCON}.mlp.dense_4h_to_h"),
  *_norm("transformer.ln_f", "final_norm"),
  row("lm_head.weight", "lm_head/kernel", "V D -> D V", when="!tie_embeddings"),
)
STARCODER2 = (
  *EMBED,
  *_BIASED_NORMS,
  *PROJECTIONS,
  *OUTPUT,
  *_plain_mlp(f"{_LAYER}.mlp.c_fc", f"{_LAYER}.mlp.c_proj"),
  *HEAD,
)
NEMOTRON = (*EMBED, *_BIASED_NORMS, *PROJECTIONS, *OUTPUT, *GATE_UP[2:], *DOWN, *HEAD)
