"""What distinguishes a model family, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from sa_jax.config import Activation
from sa_jax.formats.reader import Config, Fields, Fixed
from sa_jax.ops.rope import RopeScaling


class Rule(NamedTuple):
  """One row of a table: a checkpoint tensor, and the parameter or parameters in it.

  Patterns are einops', in the letters V (vocabulary), D (embed), N (heads), K (key/value heads), G (N / K), H (head
  dimension), R (that of values), F (MLP, or each expert), X (experts), S (the shared expert).

  Attributes:
    key: the checkpoint's name; ``{layer}`` stands for the layer number, ``{expert}`` for an expert's, whose tensor is
      then one slice along the first axis of the parameter.
    parts: each parameter's path in the layer layout, and the pattern from the checkpoint's axes to ours. Several parts
      are concatenated along the first axis.
    view: a pattern applied before that axis is split, where P is the total size of the parts along it; empty for none.
    when: fields of `ModelConfig` that must be set for the tensor to exist, or with ``!`` must not be; fields of experts
      as ``experts.shared_gate``.
    stacked: whether the tensor, and the parameters, have a leading axis of experts.
  """

  key: str
  parts: tuple[tuple[str, str], ...]
  view: str = ""
  when: str = ""
  stacked: bool = False


ACTIVATIONS: dict[str, Activation] = {
  "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared", "quick_gelu": "quick_gelu",
}  # fmt: skip
"""By transformers' names; if several mean the same, the last is written."""

KeyKind = Literal["flag", "number", "inverse", "inverse_root", "over_root_depth", "over_width"]


class Key(NamedTuple):
  """A config key that corresponds to one or more fields of `ModelConfig`.

  Attributes:
    name: Hugging Face's.
    fields: ours.
    kind: ``flag`` for true or false; otherwise a positive number or null, and how to convert x to our number: x, 1 / x,
      1 / sqrt(x), x / sqrt(number of layers), or x / width.
  """

  name: str
  fields: tuple[str, ...]
  kind: KeyKind


class ExpertKeys(NamedTuple):
  """The config keys of a family's experts.

  Attributes:
    number: the number of experts.
    normalised: whether the weights of the chosen experts sum to 1: a key, or a constant.
    shared: the width of the shared expert, which all tokens use; empty if there is none.
    shared_gate: whether that is gated.
  """

  number: str
  normalised: str | bool = True
  shared: str = ""
  shared_gate: bool = False


class Spelling(NamedTuple):
  """Conversion of a family's special config keys to and from the usual ones.

  Attributes:
    usual: from the (unchecked) contents of its ``config.json`` to the usual keys.
    own: the inverse.
  """

  usual: Callable[[Config], Config]
  own: Callable[[Fields], Fields]


class Family(NamedTuple):
  """What distinguishes a family.

  Attributes:
    architecture: its class in transformers, or in the checkpoint's code.
    table: its checkpoint's tensors.
    otherwise: the same, for files that store a layer's experts differently; empty if there are none.
    fields: fields of `ModelConfig` that are the same in all its models, or functions of their sizes.
    keys: config keys that only some families have.
    experts: the keys of its experts; None if layers have a single MLP.
    aliases: its names of config keys → the usual names.
    spelling: further differences of its config; None if only names differ.
    fixed: config keys of which only some values are implemented.
    required: config keys that must be present, and why.
    defaults: transformers' defaults for absent keys, if different from Llama's.
    inert: config keys that do not affect our computation.
    dropped: name patterns of tensors that a language model does not need, and the reasons.
    activation: the config key of the MLP's activation.
    activations: activations by the names in its config.
    window: which layers ``sliding_window`` applies to: ``all``, or those in ``layer_types``; ``optional`` if it also
      depends on ``use_sliding_window``; ``none`` if ``layer_types`` must not name any.
    is_local: whether a layer is local, from the config's values, if there is no ``layer_types``.
    local_rope: the rotary embedding of local layers: the ``same`` as global layers', their ``own``, the global one
      ``unscaled``, the only one (``alone``), or none (``without``).
    ropes: the rotary scalings that its code supports.
    interleaved: whether adjacent elements are rotated together; see `sa_jax.ops.RopeConfig`.
    fixed_stretch: whether ``alpha`` turns dynamic scaling into a fixed one (Hunyuan).
    grows_queries: whether queries are scaled by position (Llama 4's method, in Ministral 3).
  """

  architecture: str
  table: tuple[Rule, ...]
  otherwise: tuple[Rule, ...] = ()
  fields: Config = {}
  keys: tuple[Key, ...] = ()
  experts: ExpertKeys | None = None
  aliases: Mapping[str, str] = {}
  spelling: Spelling | None = None
  fixed: Mapping[str, Fixed] = {}
  required: Mapping[str, str] = {}
  defaults: Config = {}
  inert: frozenset[str] = frozenset()
  dropped: Mapping[str, str] = {}
  activation: str = "hidden_act"
  activations: Mapping[str, Activation] = ACTIVATIONS
  window: Literal["", "none", "all", "layers", "optional"] = ""
  is_local: Callable[[Config, int], bool] | None = None
  local_rope: Literal["same", "own", "unscaled", "alone", "without"] = "same"
  ropes: tuple[RopeScaling, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
  interleaved: bool = False
  fixed_stretch: bool = False
  grows_queries: bool = False

  @property
  def interleaves_values(self) -> bool:
    """Whether a tensor of its files has values between queries and keys, so that all have the same width."""
    return any(rule.view and any("v_proj" in path for path, _ in rule.parts) for rule in self.table)
