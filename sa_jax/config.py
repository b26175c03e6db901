"""`Architecture` (a model's shapes and constants) and `Compute` (how to run it); `ModelConfig` combines them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol, get_args

from sa_jax import ops
from sa_jax.errors import UserError, near
from sa_jax.fields import Constraint, Natural, Positive, misfits
from sa_jax.ops import AttentionSpec, Experts, RopeConfig

AttentionState = Literal["query_key", "attention_weights"]
RematPolicy = Literal["none", "full", "attention", "dots"]
RematChoice = Literal["auto", "none", "full", "attention", "dots"]
FloatDtype = Literal["float32", "bfloat16", "float16"]
CacheDtype = Literal["int8", "int4", None]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "quick_gelu"]
NormKind = Literal["rms", "layer"]
MlpKind = Literal["gated", "plain"]
QkNorm = Literal["head", "heads", None]

Size = Annotated[int, Constraint(lambda number: number > 0, "a positive integer")]
Token = Annotated[int, Constraint(lambda number: -(2**31) <= number < 2**31, "a 32-bit integer")]


class LayerKind(NamedTuple):
  """The attention settings that can differ between layers of the same model.

  Attributes:
    spec: window, soft cap and scale.
    rope: the rotary position embedding, or None for NoPE.
  """

  spec: AttentionSpec
  rope: RopeConfig | None


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A decoder-only transformer: Llama's architecture and the options of related families. Stored in ``config.json``.

  Attributes:
    vocab_size: ``V``.
    embed_dim: ``D``.
    num_layers: ``L``.
    num_heads: ``N``, query heads.
    num_kv_heads: ``K``, key/value heads; query head ``n`` uses key/value head ``n // (N / K)``.
    head_dim: ``H``.
    value_dim: ``R``, the size of a head's values, if smaller than that of its keys; None for ``H``.
    mlp_dim: ``F``; in a mixture of experts, per expert.
    max_length: the context length the model was trained for, in tokens.
    norm: ``rms``, or ``layer``, which also subtracts the mean.
    norm_eps: added to the mean square, or to the variance.
    norm_bias: whether norms add a bias.
    rope: the rotary position embedding; None for NoPE.
    tie_embeddings: whether the output head is the embedding.
    qkv_bias: whether queries, keys and values have biases.
    output_bias: whether attention's output projection has a bias.
    mlp_bias: whether the MLP's projections have biases; in a mixture, those of all experts and of the router.
    head_bias: whether the output head has a bias.
    qk_norm: normalisation of queries and keys: per ``head`` (Qwen 3, Gemma 3), across all ``heads`` (OLMo 2), or None.
    norm_rotated: whether that comes after RoPE (Hunyuan) instead of before.
    norm_about_one: whether norms multiply by 1 + scale (Gemma).
    pre_norms: whether the inputs of attention and MLP are normalised.
    post_norms: whether the outputs of attention and MLP are normalised before the residual: in addition (Gemma 2,
      3), or only these (OLMo 2).
    parallel: whether the MLP has the same input as attention, instead of the residual sum after it (GPT-NeoX, Cohere).
    shared_norm: whether both then use one norm (Cohere, Phi-2).
    mlp: ``gated``: ``down(f(gate(x)) * up(x))``; ``plain``: ``down(f(up(x)))``.
    experts: the experts that replace the MLP in every layer; None for a single MLP.
    mlp_clamp: ``c`` of a gated MLP ``down(f(min(gate(x), c)) * (1 + clip(up(x), -c, c)))`` (gpt-oss); None for
      ``down(f(gate(x)) * up(x))``.
    activation: the MLP's ``f``; of the GELUs, ``gelu_tanh`` is the tanh approximation, and ``quick_gelu`` is
      ``x sigmoid(1.702 x)``.
    embedding_scale: factor of the embeddings.
    residual_scale: factor of the outputs of attention and MLP before the residual (Granite, MiniCPM).
    logits_scale: factor of the logits.
    sinks: whether each query head of an anchor has a sink, which takes part of its attention and contributes nothing
      (gpt-oss); see `sa_jax.ops.Rows`.
    normalize_head: whether the output head's rows are normalised to unit length (Baichuan 2's NormHead).
    attention_scale: factor of the attention scores; None for ``1 / sqrt(H)``.
    attention_softcap: attention scores ``s`` become ``cap * tanh(s / cap)`` (Gemma 2); None for no cap.
    logits_softcap: the same for the logits.
    window: how many tokens a query of a local layer sees, itself included; None for all.
    local_layers: the layers with that window; the others are global.
    local_rope: the rotary embedding of local layers; None for ``rope`` (Gemma 3; SmolLM 3, where they have none).
    family: the Hugging Face ``model_type`` whose tensor names and config format its checkpoints use.
    bos_token_id: prepended to a text, or None.
    eos_token_ids: tokens that end a generation.
    pad_token_id: fills rows after their end, or None.
  """

  vocab_size: Size
  embed_dim: Size
  num_layers: Size
  num_heads: Size
  num_kv_heads: Size
  head_dim: Size
  mlp_dim: Size
  max_length: Size = 2048
  value_dim: Size | None = None
  norm: NormKind = "rms"
  norm_eps: Positive = 1e-5
  norm_bias: bool = False
  rope: RopeConfig | None = dataclasses.field(default_factory=RopeConfig)
  tie_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  qk_norm: QkNorm = None
  norm_rotated: bool = False
  norm_about_one: bool = False
  pre_norms: bool = True
  post_norms: bool = False
  parallel: bool = False
  shared_norm: bool = False
  mlp: MlpKind = "gated"
  mlp_clamp: Positive | None = None
  experts: Experts | None = None
  activation: Activation = "silu"
  embedding_scale: Positive = 1.0
  residual_scale: Positive = 1.0
  logits_scale: Positive = 1.0
  normalize_head: bool = False
  sinks: bool = False
  attention_scale: Positive | None = None
  attention_softcap: Positive | None = None
  logits_softcap: Positive | None = None
  window: Size | None = None
  local_layers: tuple[Natural, ...] = ()
  local_rope: RopeConfig | None = None
  family: str = "llama"
  bos_token_id: Token | None = None
  eos_token_ids: tuple[Token, ...] = ()
  pad_token_id: Token | None = None

  def contradictions(self) -> list[str]:
    """Values that contradict each other, one line each."""
    wrong = []
    if self.num_heads % self.num_kv_heads:
      wrong.append(f"num_heads={self.num_heads} (must be a multiple of num_kv_heads={self.num_kv_heads})")
    if self.rope is not None and self.rope.rotated(self.head_dim) % 2:
      wrong.append(f"head_dim={self.head_dim} (must be even for rotary embedding)")
    if self.value_width > self.head_dim:
      wrong.append(f"value_dim={self.value_dim} (must be at most head_dim={self.head_dim})")
    both = [(rope.fraction, rope.interleaved) for rope in (self.rope, self.local_rope) if rope is not None]
    if len(set(both)) > 1:
      wrong.append("local_rope has a different fraction or order than rope (must be the same)")
    if self.local_layers and self.window is None and self.local_rope is None:
      wrong.append("window=None (local_layers need a number of tokens, or a separate rotary embedding)")
    if outside := [layer for layer in self.local_layers if not 0 <= layer < self.num_layers]:
      wrong.append(f"local_layers has {outside} (layers are 0 to {self.num_layers - 1})")
    if self.normalize_head and self.tie_embeddings:
      wrong.append("normalize_head=True (a head that is tied to the embedding cannot be normalised)")
    if self.head_bias and self.tie_embeddings:
      wrong.append("head_bias=True (a head that is tied to the embedding has no bias)")
    if self.shared_norm and not (self.parallel and self.pre_norms):
      wrong.append("shared_norm=True (needs parallel=True and pre_norms=True)")
    if not (self.pre_norms or self.post_norms):
      wrong.append("pre_norms=False (without post_norms nothing would be normalised)")
    if self.mlp_clamp is not None and self.mlp != "gated":
      wrong.append(f"mlp_clamp={self.mlp_clamp} (needs mlp='gated')")
    if self.experts is not None:
      wrong += self.experts.faults()
      if self.mlp != "gated":
        wrong.append(f"mlp={self.mlp!r} (experts need 'gated')")
    return wrong

  @property
  def value_width(self) -> int:
    """``R``: `value_dim`, or ``H`` if that is None."""
    return self.head_dim if self.value_dim is None else self.value_dim

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The model's kinds of layers, in order of first occurrence."""
    return tuple(dict.fromkeys(self._kind(layer) for layer in range(self.num_layers)))

  def kind_of(self, layer: int) -> int:
    """Which of `kinds` a layer is."""
    return self.kinds.index(self._kind(layer))

  def window_of(self, layer: int) -> int | None:
    """How many tokens a layer sees; None for all."""
    return self._kind(layer).spec.window

  def may_follow(self, layer: int, anchor: int) -> bool:
    """Whether a layer may use another's attention weights: it sees the same keys. Its RoPE may differ."""
    return self.window_of(layer) == self.window_of(anchor)

  @property
  def can_follow(self) -> tuple[int, ...]:
    """The layers that may follow the layer before them; no others can be followers."""
    return tuple(each for each in range(1, self.num_layers) if self.may_follow(each, each - 1))

  def _kind(self, layer: int) -> LayerKind:
    local = layer in self.local_layers
    spec = AttentionSpec(self.window if local else None, self.attention_softcap, self.attention_scale)
    rope = self.local_rope if local and self.local_rope is not None else self.rope
    return LayerKind(spec, None if rope is None or rope.scaling == "none" else rope)

  @property
  def rope_depends_on_row(self) -> bool:
    """Whether attention depends on more than the distance of two tokens: on the row length, or on their positions."""
    return any(rope.depends_on_length or rope.query_growth for _, rope in self.kinds if rope is not None)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed: dtypes, kernels, rematerialisation. Not stored in ``config.json``.

  Attributes:
    dtype: dtype of activations, a NumPy dtype name.
    param_dtype: dtype of parameters, a NumPy dtype name.
    cache_dtype: dtype of cached keys and values: ``int8`` or ``int4``, with one scale per head and token
      (`sa_jax.ops.FORMATS`), or None for ``dtype``.
    attention: the attention backend, built in or from `sa_jax.ops.register_backend`; see `sa_jax.ops.attend`.
    attention_state: what an anchor passes to its followers: ``query_key`` (its rotary-encoded q and k, O(T) memory, any
      fused kernel) or ``attention_weights`` (the softmaxed weights, O(T S) memory, the paper's literal algorithm).
    remat: what the backward pass recomputes in each group: ``none``, ``full`` (everything), ``attention`` (everything
      but attention outputs: one more array of the size of the block's input is stored per layer), or ``dots``
      (everything but attention outputs and matrix products with parameters).
    group_backward: whether a group's followers share one backward pass for q and k (`sa_jax.ops.attention.group`). This
      takes fewer products, but stores each follower's values and output gradients until then. If the backend has no
      such backward pass, or followers have head maps, each layer has its own.
  """

  dtype: str = "float32"
  param_dtype: str = "float32"
  cache_dtype: CacheDtype = None
  attention: str = "auto"
  attention_state: AttentionState = "query_key"
  remat: RematPolicy = "none"
  group_backward: bool = False

  @property
  def cache_format(self) -> ops.Format | None:
    """The storage format of ``cache_dtype``; None if vectors are stored in the compute dtype."""
    return None if self.cache_dtype is None else ops.FORMATS[self.cache_dtype]

  def unknown(self) -> list[str]:
    """Unknown names, one line each."""
    dtypes = get_args(FloatDtype)
    choices = {"attention": ("auto", *ops.backends), "dtype": dtypes, "param_dtype": dtypes}
    return [
      f"{name}={value!r} (must be one of {', '.join(known)}{near(str(value), known)})"
      for name, known in choices.items()
      if (value := getattr(self, name)) not in known
    ]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Compute, Architecture):
  """What a model is (`Architecture`) and how it is computed (`Compute`), in one flat value.

  Fields of both are set by name and changed with `dataclasses.replace`. The checkpoint determines the architecture;
  compute fields may be changed freely.
  """

  def __post_init__(self) -> None:
    if wrong := misfits(self) + self.unknown() or self.contradictions():
      raise UserError.of("model config", wrong)

  def contradictions(self) -> list[str]:
    """Values that contradict each other, one line each."""
    odd = [] if self.cache_format is None else [
      f"{name}={width} (must be a multiple of {self.cache_format.per_byte} for a cache in {self.cache_dtype})"
      for name, width in (("head_dim", self.head_dim), ("value_dim", self.value_width))
      if width % self.cache_format.per_byte
    ]  # fmt: skip
    return super().contradictions() + odd

  @property
  def architecture(self) -> Architecture:
    """The architecture fields only."""
    return Architecture(**_fields_of(Architecture, self))

  @property
  def compute(self) -> Compute:
    """The compute fields only."""
    return Compute(**_fields_of(Compute, self))

  @classmethod
  def preset(cls, name: str, **changes: Any) -> ModelConfig:
    """A well-known model's config by name, with fields changed on request.

    Raises:
      UserError: if there is no preset of that name.
    """
    if name not in PRESETS:
      raise UserError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}{near(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)

  @classmethod
  def from_hf(cls, values: Mapping[str, Any], *, strict: bool = False) -> ModelConfig:
    """Reads the contents of a Hugging Face ``config.json``; see `sa_jax.formats.hf_config`."""
    return _hf.read(values, strict)

  def to_hf(self, spelling: Literal["v4", "v5"] = "v5") -> dict[str, Any]:
    """The contents of a Hugging Face ``config.json``; see `sa_jax.formats.hf_config`."""
    return _hf.write(self, spelling)


def _fields_of(kind: type[Architecture | Compute], value: ModelConfig) -> dict[str, Any]:
  return {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}


class HfSpelling(Protocol):
  """Hugging Face's config format. `sa_jax.formats` provides it, which depends on `ModelConfig`; not the reverse."""

  def read(self, values: Mapping[str, Any], strict: bool) -> ModelConfig:
    """Reads the contents of a ``config.json``."""
    ...

  def write(self, config: ModelConfig, spelling: Literal["v4", "v5"]) -> dict[str, Any]:
    """Returns the contents of a ``config.json``."""
    ...


_hf: HfSpelling


def use_hf_spelling(spelling: HfSpelling) -> None:
  """Sets what `ModelConfig.from_hf` and `ModelConfig.to_hf` call; importing `sa_jax` does that."""
  global _hf
  _hf = spelling


PRESETS: dict[str, ModelConfig] = {
  "llama-2-7b": ModelConfig(
    vocab_size=32_000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11_008,
    max_length=4096, bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16", param_dtype="bfloat16",
  ),
  "llama-2-13b": ModelConfig(
    vocab_size=32_000, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128, mlp_dim=13_824,
    max_length=4096, bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16", param_dtype="bfloat16",
  ),
  "llama-3-8b": ModelConfig(
    vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
    max_length=8192, rope=RopeConfig(theta=500_000.0), bos_token_id=128_000, eos_token_ids=(128_001,),
    dtype="bfloat16", param_dtype="bfloat16",
  ),
  "mixtral-8x7b": ModelConfig(
    vocab_size=32_000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
    experts=Experts(count=8, chosen=2), family="mixtral", max_length=32_768, rope=RopeConfig(theta=1e6),
    bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16", param_dtype="bfloat16",
  ),
  "gpt-oss-20b": ModelConfig(
    vocab_size=201_088, embed_dim=2880, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64, mlp_dim=2880,
    experts=Experts(count=32, chosen=4), activation="quick_gelu", mlp_clamp=7.0, mlp_bias=True, sinks=True,
    qkv_bias=True, output_bias=True, window=128, local_layers=tuple(range(0, 24, 2)), family="gpt_oss",
    rope=RopeConfig(150_000.0, "yarn", 32.0, original_max_length=4096, truncate=False), max_length=131_072,
    bos_token_id=199_998, eos_token_ids=(200_002,), pad_token_id=199_999, dtype="bfloat16", param_dtype="bfloat16",
  ),
  "smollm2-135m": ModelConfig(
    vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
    max_length=8192, rope=RopeConfig(theta=100_000.0), tie_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
    pad_token_id=2, dtype="bfloat16", param_dtype="bfloat16",
  ),
}  # fmt: skip
