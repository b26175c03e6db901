"""Parameters, FLOPs and cache bytes of a model and a plan, counted without running anything."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from sa_jax.config import ModelConfig
from sa_jax.display import quantity, table
from sa_jax.errors import UserError
from sa_jax.nn.transformer import check_plan
from sa_jax.plan import PlanLike, as_plan

LABELS = {
  "params": ("parameters", ""),
  "active_params": ("active parameters", ""),
  "param_bytes": ("parameter bytes", "B"),
  "flops": ("FLOPs of a forward pass", ""),
  "decode_flops": ("FLOPs of a decode step", ""),
  "kv_bytes_per_token": ("KV cache bytes per token", "B"),
  "kv_cache_bytes": ("KV cache bytes", "B"),
  "decode_bytes": ("bytes read by a decode step", "B"),
}
"""Labels and units of the fields of `Cost` in tables."""


@dataclasses.dataclass(frozen=True)
class Cost:
  """Costs of (config, plan, batch, seq_len).

  Matrix products count two FLOPs per multiply-add; elementwise work is ignored. Attention counts the keys that a causal
  query sees, not the masked ones.

  Attributes:
    params: parameters, a tied head counted once.
    active_params: parameters that one token goes through: in a mixture, without the experts that it does not choose.
    param_bytes: bytes of ``params`` in the config's ``param_dtype``.
    flops: one forward pass over ``batch`` sequences of ``seq_len`` tokens, logits at every position, by the literal
      algorithm: with the attention state ``query_key``, a follower's fused attention recomputes the scores.
    decode_flops: one decode step of ``batch`` rows whose cache holds ``seq_len`` tokens, including the new one.
    kv_cache_bytes: KV cache of ``batch`` rows of ``seq_len`` slots, in the config's format.
    kv_bytes_per_token: KV cache bytes per token of one row.
    decode_bytes: what a decode step must read: the parameters (only the looked-up rows of an untied embedding; only the
      experts that the rows choose together, on average for random choices), and the cache.
  """

  params: int
  active_params: int
  param_bytes: int
  flops: int
  decode_flops: int
  kv_cache_bytes: int
  kv_bytes_per_token: int
  decode_bytes: int

  def _repr_html_(self) -> str:
    """A table, for notebooks."""
    return table([(label, quantity(getattr(self, name), unit)) for name, (label, unit) in self.labels.items()])

  @property
  def labels(self) -> dict[str, tuple[str, str]]:
    """`LABELS` without redundant ones: active parameters only if they differ from all."""
    return {name: each for name, each in LABELS.items() if name != "active_params" or self.active_params < self.params}


def cost(config: ModelConfig, plan: PlanLike, batch: int = 1, seq_len: int = 1) -> Cost:
  """Counts what a model costs under a plan.

  Args:
    config: the model.
    plan: a plan, a plan string, or None for dense.
    batch: rows, ``B``.
    seq_len: tokens per row, ``S``.

  Raises:
    UserError: if the plan does not fit the model, or a size is not positive.
  """
  plan = as_plan(plan, config.num_layers)
  check_plan(config, plan)
  if batch < 1 or seq_len < 1:
    raise UserError(f"batch and seq_len must be at least 1, not {batch} and {seq_len}")
  layers, anchors = plan.num_layers, len(plan.anchors)
  embed, heads, kv_heads = config.embed_dim, config.num_heads, config.num_kv_heads

  query_key = embed * (heads + kv_heads) * config.head_dim
  value_output = embed * (kv_heads + heads) * config.value_width
  matrices = anchors * query_key + layers * (value_output + _outside_experts(config))
  experts, of_expert = config.experts, layers * _expert(config)
  multiplied = 3 * layers * embed * config.mlp_dim
  stored, active, read = (0, 0, 0) if experts is None else (experts.count, experts.chosen, experts.expected(batch))
  outside = _norm(config) + (config.vocab_size if config.head_bias else 0)
  vectors = outside + layers * _vectors(config) + anchors * _anchor_vectors(config)
  embedding = config.vocab_size * embed
  others = matrices + vectors + embedding * (1 if config.tie_embeddings else 2)

  # Scores in anchors, weighted sums of values in every layer; a local layer sees no more than its window.
  forward_attention = decode_attention = 0
  for layer, source in enumerate(plan.source):
    window = min(seq_len, config.window or seq_len) if source in config.local_layers else seq_len
    products = 2 * heads * (config.value_width + (config.head_dim if layer == source else 0))
    forward_attention += products * (window * (window + 1) // 2 + (seq_len - window) * window)
    decode_attention += products * window
  per_token = 2 * (matrices + active * multiplied + embedding)

  param_itemsize = jnp.dtype(config.param_dtype).itemsize
  of_vectors = anchors * _cached(config, config.head_dim) + layers * _cached(config, config.value_width)
  kv_bytes_per_token = kv_heads * of_vectors
  kv_cache_bytes = batch * seq_len * kv_bytes_per_token
  looked_up = 0 if config.tie_embeddings else batch * embed
  read_params = matrices + round(read * of_expert) + vectors + embedding + looked_up
  params = others + stored * of_expert
  return Cost(
    params=params,
    active_params=others + active * of_expert,
    param_bytes=params * param_itemsize,
    flops=batch * (seq_len * per_token + forward_attention),
    decode_flops=batch * (per_token + decode_attention),
    kv_cache_bytes=kv_cache_bytes,
    kv_bytes_per_token=kv_bytes_per_token,
    decode_bytes=read_params * param_itemsize + kv_cache_bytes,
  )


def _cached(config: ModelConfig, width: int) -> int:
  """Bytes of one head's key or value per token, including the scale if quantised."""
  form = config.cache_format
  return width * jnp.dtype(config.dtype).itemsize if form is None else form.nbytes(width)


def expert_bytes(config: ModelConfig, part: float = 1.0, tokens: int | None = None) -> float:
  """Bytes of a fraction of the experts: of all, or of those that ``tokens`` tokens choose together on average."""
  if config.experts is None:
    return 0.0
  number = config.experts.count if tokens is None else config.experts.expected(tokens)
  return part * number * config.num_layers * _expert(config) * jnp.dtype(config.param_dtype).itemsize


def _expert(config: ModelConfig) -> int:
  """Parameters of one expert of a layer."""
  return 3 * config.embed_dim * config.mlp_dim + _mlp_bias(config, config.mlp_dim)


def _mlp_bias(config: ModelConfig, width: int) -> int:
  """Parameters of the biases of an MLP of this width."""
  return (2 if config.mlp == "gated" else 1) * width + config.embed_dim if config.mlp_bias else 0


def _outside_experts(config: ModelConfig) -> int:
  """Parameters of a layer's matrices after attention: its MLP's, or in a mixture all but the experts'."""
  if (experts := config.experts) is None:
    return (3 if config.mlp == "gated" else 2) * config.embed_dim * config.mlp_dim
  return config.embed_dim * (experts.count + 3 * experts.shared_width + experts.shared_gate)


def _norm(config: ModelConfig) -> int:
  """Parameters of a norm over the width."""
  return config.embed_dim * (2 if config.norm == "layer" and config.norm_bias else 1)


def _vectors(config: ModelConfig) -> int:
  """Parameters of a layer, anchor or follower, that are not in matrices: norms and biases."""
  norms = (2 - config.shared_norm) * config.pre_norms + 2 * config.post_norms
  value_bias = config.num_kv_heads * config.value_width if config.qkv_bias else 0
  output_bias = config.embed_dim if config.output_bias else 0
  mlp_bias = _mlp_bias(config, config.mlp_dim)
  if (experts := config.experts) is not None:
    mlp_bias = experts.count * config.mlp_bias + (
      _mlp_bias(config, experts.shared_width) if experts.shared_width else 0
    )
  return norms * _norm(config) + value_bias + output_bias + mlp_bias


def _anchor_vectors(config: ModelConfig) -> int:
  """An anchor's additional parameters: biases and norms of queries and keys, and sinks."""
  heads = config.num_heads + config.num_kv_heads
  biases = heads * config.head_dim if config.qkv_bias else 0
  normalised = {None: 0, "head": 2, "heads": heads}[config.qk_norm] * config.head_dim
  sinks = config.num_heads if config.sinks else 0
  return biases + normalised * (2 if config.norm == "layer" and config.norm_bias else 1) + sinks
