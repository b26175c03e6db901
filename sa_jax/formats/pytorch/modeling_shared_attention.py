"""Shared Attention in PyTorch, for transformers: followers reuse their anchor's attention weights.

Written by sa_jax's export beside a checkpoint, and loaded with ``AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)``. Liao & Vargas, "Beyond KV Caching: Shared Attention for Efficient LLMs", arXiv 2407.12866.

``config.shared_attention["source"]`` has one entry per layer: the layer whose softmaxed weights it uses, an anchor's
being its own index. ``config.shared_attention["head_map"]``, if present, gives for each layer the anchor head that each
of its query heads uses, or null for the head of the same index. A follower has no queries and keys, and caches only its
values. ``config.shared_attention["value_dim"]``, if present, is the size of a head's values, if smaller than that of
its keys. Attention is eager: fused kernels never materialise the weights that followers need.

The model types are specific to this file, so that transformers does not open such a folder without it: the family's
class would initialise random queries and keys for the followers.
"""

import functools
import inspect
import sys
import threading

import torch
import transformers
from torch import nn
from torch.nn.functional import pad
from transformers import conversion_mapping
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# What models call the cache that they are given; transformers renamed it in 5.24. Some layers have a name of their own.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
CACHES = ("cache", "past_key_values", "layer_past")
# What families call the projections of values, with which some make queries and keys, and of the output.
VALUES = ("v_proj", "qkv_proj", "query_key_value")
OUTPUT = ("o_proj", "dense")
# The weights of this thread's forward pass, by layer. They are no argument, because some families' layers pass none on,
# and what accelerate dispatches to devices gets copies of its arguments.
PASS = threading.local()


class Anchor:
  """Makes the family's attention keep its weights for followers."""

  def forward(self, hidden_states, **kwargs):
    output, weights = super().forward(hidden_states, **kwargs)
    PASS.weights[self.layer_idx] = weights
    return output, weights


class Follower:
  """Makes the family's attention use an anchor's weights: it has only values and output."""

  def forward(self, hidden_states, **kwargs):
    values, output = (getattr(self, name) for name in self.names)
    values = values(hidden_states).unflatten(-1, (-1, self.width)).transpose(1, 2)
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if cache is not None:
      _, values = cache.update(values[..., :0], values, self.layer_idx)
    weights = PASS.weights[self.source].to(values.device)
    if self.head_map is not None:
      weights = weights[:, self.head_map]
    heads = weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
    return output(heads.transpose(1, 2).flatten(-2)), weights


@functools.cache
def attention_of(kind, family):
  """The class of a family's anchors or followers; transformers records the weights of both."""
  return type(f"{kind.__name__}{family.__name__}", (kind, family), {})


class NarrowValues(nn.Linear):
  """Narrow values, padded with zeros to the width of keys, as the family's attention expects.

  Queries and keys, if computed by the same projection, come first.
  """

  def __init__(self, wide, heads, width, missing):
    super().__init__(wide.in_features, wide.out_features - heads * missing, bias=wide.bias is not None)
    self.heads, self.width, self.missing = heads, width, missing

  def forward(self, hidden_states):
    queries_and_keys, values = super().forward(hidden_states).tensor_split([-self.heads * self.width], dim=-1)
    values = pad(values.unflatten(-1, (self.heads, self.width)), (0, self.missing)).flatten(-2)
    return torch.cat([queries_and_keys, values], dim=-1)


class NarrowOutput(nn.Linear):
  """The output projection for narrow values, without inputs for the padding."""

  def __init__(self, wide, heads, width):
    super().__init__(heads * width, wide.out_features, bias=wide.bias is not None)
    self.heads, self.width = heads, width

  def forward(self, heads):
    return super().forward(heads.unflatten(-1, (self.heads, -1))[..., : self.width].flatten(-2))


class NarrowLayer(DynamicLayer):
  """An anchor's cache of narrow values, without the padding."""

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
  """Turns a causal language model from transformers into one whose layers share attention weights."""

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
    attentions = [module for module in self.modules() if type(module).__name__.endswith("Attention")]
    for attention, anchor, heads in zip(attentions, source, head_map, strict=True):
      self._share(attention, anchor, heads)

  def _share(self, attention, anchor, head_map):
    """Makes a layer's attention an anchor's or a follower's."""
    names = [next(name for name in names if hasattr(attention, name)) for names in (VALUES, OUTPUT)]
    values, output = (getattr(attention, name) for name in names)
    heads = self.config.num_attention_heads
    head_dim = output.in_features // heads
    value_heads = values.out_features // head_dim
    if names[0] != "v_proj":
      value_heads = (value_heads - heads) // 2
    width = self.value_dim or head_dim
    kind = Anchor if attention.layer_idx == anchor else Follower
    if kind is Follower:
      for name, _ in [*attention.named_parameters(recurse=False), *attention.named_children()]:
        delattr(attention, name)
      values = nn.Linear(values.in_features, value_heads * width, bias=values.bias is not None)
      output = nn.Linear(heads * width, output.out_features, bias=output.bias is not None)
      attention.source, attention.head_map, attention.width, attention.names = anchor, head_map, width, names
    elif width < head_dim:
      values = NarrowValues(values, value_heads, width, head_dim - width)
      output = NarrowOutput(output, heads, width)
    for name, projection in zip(names, (values, output)):
      setattr(attention, name, projection)
    attention.__class__ = attention_of(kind, type(attention))

  def forward(self, input_ids=None, cache=None, past_key_values=None, use_cache=None, **kwargs):
    use_cache = self.config.use_cache if use_cache is None else use_cache
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
      cache = DynamicCache(config=self.config)
    if cache is not None:
      self._cache_what_is_needed(cache)
    PASS.weights = {}
    try:
      return super().forward(input_ids=input_ids, use_cache=use_cache, **{CACHE: cache}, **kwargs)
    finally:
      PASS.weights = None

  def _cache_what_is_needed(self, cache):
    missing = self.config.num_hidden_layers - len(cache.layers)
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


def _read_as(family, own):
  """Applies transformers' conversions of a family's tensors on loading, such as stacking experts, to ours."""
  if conversion := conversion_mapping.get_checkpoint_conversion_mapping(family):
    conversion_mapping.register_checkpoint_conversion_mapping(own, conversion, overwrite=True)


def __getattr__(name):
  """``SharedX…`` derived from transformers' ``X…``: a causal language model, or its config, for any family X.

  Only requested classes are created, once.
  """
  if not name.startswith("Shared") or not name.endswith(("ForCausalLM", "Config")):
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  family = name.removeprefix("Shared").removesuffix("ForCausalLM").removesuffix("Config")
  model = getattr(transformers, f"{family}ForCausalLM")
  config = model.config_class
  if name.endswith("Config"):
    made = type(name, (config,), {"__module__": __name__, "model_type": f"shared_{config.model_type}"})
    _read_as(config.model_type, made.model_type)
  else:
    config = getattr(sys.modules[__name__], f"Shared{family}Config")
    made = type(name, (SharedAttention, model), {"__module__": __name__, "config_class": config})
    _read_as(model.__name__, name)
  return globals().setdefault(name, made)
