"""Shared Attention in PyTorch, for transformers: followers reuse their anchor's attention weights.

Written by sa_jax's export beside a checkpoint, and loaded with ``AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)``. Liao & Vargas, "Beyond KV Caching: Shared Attention for Efficient LLMs", arXiv 2407.12866.

``config.shared_attention["source"]`` has one entry a layer: the layer whose softmaxed weights it uses, its own number
for an anchor. ``config.shared_attention["head_map"]``, if there is one, says for each layer which anchor head each of
its query heads uses, or null for the head of its own number. A follower has no queries and no keys, and caches its
values alone. ``config.shared_attention["value_dim"]``, if there is one, is how many numbers a head's values have, where
that is fewer than its keys have. Attention is eager: the weights that followers need are never formed by fused kernels.

The model types are this file's own, so that transformers does not open such a folder without it: the family's class
would make random queries and keys for the followers.
"""

import inspect
import sys

import transformers
from torch import nn
from torch.nn.functional import pad
from transformers import conversion_mapping
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# What layers and models call the cache that they are given; transformers renamed it in 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def leaving_weights(attention_class):
  """A class of attention whose weights are left for followers in the forward pass's ``shared`` dictionary."""

  class AnchorAttention(attention_class):
    def forward(self, hidden_states, shared, **kwargs):
      output, weights = super().forward(hidden_states=hidden_states, **kwargs)
      shared[self.layer_idx] = weights
      return output, weights

  return AnchorAttention


class NarrowValues(nn.Linear):
  """Values of few numbers a head, filled up with zeros to the width of keys, as the family's attention takes them."""

  def __init__(self, wide, heads, width):
    super().__init__(wide.in_features, heads * width, bias=wide.bias is not None)
    self.width, self.missing = width, wide.out_features // heads - width

  def forward(self, hidden_states):
    return pad(super().forward(hidden_states).unflatten(-1, (-1, self.width)), (0, self.missing)).flatten(-2)


class NarrowOutput(nn.Linear):
  """The output projection of such values' attention, which does not read what fills them up."""

  def __init__(self, wide, heads, width):
    super().__init__(heads * width, wide.out_features, bias=wide.bias is not None)
    self.heads, self.width = heads, width

  def forward(self, heads):
    return super().forward(heads.unflatten(-1, (self.heads, -1))[..., : self.width].flatten(-2))


class FollowerAttention(nn.Module):
  """Attention with an anchor's weights: values and output alone."""

  def __init__(self, attention, source, head_map, width):
    super().__init__()
    self.source, self.head_map, self.layer_idx, self.width = source, head_map, attention.layer_idx, width
    self.head_dim, self.groups = attention.head_dim, attention.num_key_value_groups
    self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

  def forward(self, hidden_states, shared, **kwargs):
    batch, length, _ = hidden_states.shape
    values = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim)[..., : self.width].transpose(1, 2)
    if (cache := kwargs.get(CACHE)) is not None:
      _, values = cache.update(values[..., :0], values, self.layer_idx)
    weights = shared[self.source]
    if self.head_map is not None:
      weights = weights[:, self.head_map]
    output = weights @ values.repeat_interleave(self.groups, dim=1)
    return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1)), weights


class NarrowLayer(DynamicLayer):
  """An anchor's cache of narrow values, without what fills them up."""

  def __init__(self, width):
    super().__init__()
    self.width = width

  def update(self, key_states, value_states, *args, **kwargs):
    keys, values = super().update(key_states, value_states[..., : self.width], *args, **kwargs)
    return keys, pad(values, (0, value_states.shape[-1] - self.width))


class ValueLayer(DynamicLayer):
  """A follower's cache: values, and keys of width zero."""

  def get_seq_length(self):
    return self.values.shape[-2] if self.is_initialized and self.values.numel() else 0


class SharedAttention:
  """Turns a causal language model of transformers into one whose layers share attention weights."""

  _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
  _can_record_outputs = {}
  supports_gradient_checkpointing = False  # recomputing a follower would need its anchor's weights again

  def __init__(self, config):
    config._attn_implementation = "eager"
    super().__init__(config)
    if unknown := set(config.shared_attention) - {"source", "head_map", "value_dim"}:
      raise ValueError(f"config.shared_attention has {sorted(unknown)}, which this file does not implement")
    source = config.shared_attention["source"]
    head_map = config.shared_attention.get("head_map") or [None] * len(source)
    self.followers = [layer for layer, anchor in enumerate(source) if layer != anchor]
    self.value_dim = config.shared_attention.get("value_dim")
    anchor_class = leaving_weights(type(self.model.layers[0].self_attn))
    for index, (layer, anchor) in enumerate(zip(self.model.layers, source, strict=True)):
      if self.value_dim is not None:
        attention, heads = layer.self_attn, config.num_attention_heads
        attention.o_proj = NarrowOutput(attention.o_proj, heads, self.value_dim)
        attention.v_proj = NarrowValues(attention.v_proj, heads // attention.num_key_value_groups, self.value_dim)
      if index == anchor:
        layer.self_attn.__class__ = anchor_class
      else:
        layer.self_attn = FollowerAttention(layer.self_attn, anchor, head_map[index], self.value_dim)

  def forward(self, input_ids=None, cache=None, past_key_values=None, use_cache=None, **kwargs):
    use_cache = self.config.use_cache if use_cache is None else use_cache
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
      cache = DynamicCache(config=self.config)
    if cache is not None:
      self._cache_what_is_needed(cache)
    return super().forward(input_ids=input_ids, use_cache=use_cache, shared={}, **{CACHE: cache}, **kwargs)

  def _cache_what_is_needed(self, cache):
    missing = len(self.model.layers) - len(cache.layers)
    cache.layers.extend(DynamicLayer() for _ in range(missing))
    if self.value_dim is not None:
      for index in set(range(len(cache.layers))).difference(self.followers):
        if type(cache.layers[index]) is DynamicLayer and not cache.layers[index].is_initialized:
          cache.layers[index] = NarrowLayer(self.value_dim)
    for layer in self.followers:
      if type(cache.layers[layer]) is DynamicLayer and not cache.layers[layer].is_initialized:
        cache.layers[layer] = ValueLayer()
      elif not isinstance(cache.layers[layer], ValueLayer | DynamicSlidingWindowLayer):
        raise ValueError(f"followers take a DynamicCache, not one with a {type(cache.layers[layer]).__name__}")


def __getattr__(name):
  """``SharedX…`` made of transformers' ``X…``: a causal language model, or its config, for any family X.

  Only what is asked for is imported, and made once.
  """
  if not name.startswith("Shared") or not name.endswith(("ForCausalLM", "Config")):
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  family = name.removeprefix("Shared").removesuffix("ForCausalLM").removesuffix("Config")
  model = getattr(transformers, f"{family}ForCausalLM")
  config = model.config_class
  if name.endswith("Config"):
    made = type(name, (config,), {"__module__": __name__, "model_type": f"shared_{config.model_type}"})
    # What transformers does to the family's tensors as it reads them: stacking experts, for example.
    if conversion := conversion_mapping.get_checkpoint_conversion_mapping(config.model_type):
      conversion_mapping.register_checkpoint_conversion_mapping(made.model_type, conversion, overwrite=True)
  else:
    config = getattr(sys.modules[__name__], f"Shared{family}Config")
    made = type(name, (SharedAttention, model), {"__module__": __name__, "config_class": config})
  return globals().setdefault(name, made)
