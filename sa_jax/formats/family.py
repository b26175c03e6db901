"""What sets a model family apart, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from sa_jax.config import Activation
from sa_jax.formats.reader import Config, Fields, Fixed
from sa_jax.ops.rope import RopeScaling


class Rule(NamedTuple):
  """One row of a table: a checkpoint tensor, and the parameter or parameters that it holds.

  Patterns are einops', in the letters V (vocabulary), D (embed), N (heads), K (key/value heads), G (N / K), H (head
  dimension), R (that of values), F (MLP, or each expert), X (experts), S (the shared expert).

  Attributes:
    key: the checkpoint's name; ``{layer}`` stands for the layer's number, ``{expert}`` for that of an expert, whose
      tensor is then one of those that lie along the first axis of the parameter.
    parts: each parameter's path in the layer layout, and the pattern from the checkpoint's axes to ours. Several parts
      lie behind each other along the first axis.
    view: a pattern applied before that axis is divided, where P is the sum of the parts along it; none when empty.
    when: the fields of `ModelConfig` that must be set for the tensor to be there, or with ``!`` must not be; of the
      experts' fields, as ``experts.shared_gate``.
    stacked: whether the tensor has one more axis before these, of the experts, and so have the parameters.
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
"""By transformers' names; of several for one, the last is written."""

KeyKind = Literal["flag", "number", "inverse", "inverse_root", "over_root_depth", "over_width"]


class Key(NamedTuple):
  """A config key that is a field of `ModelConfig`, or several.

  Attributes:
    name: Hugging Face's.
    fields: ours.
    kind: ``flag`` for true or false; otherwise a positive number or null, and how it becomes our number: as it is, 1
      over it, 1 over its square root, it over the square root of the number of layers, or it over the width.
  """

  name: str
  fields: tuple[str, ...]
  kind: KeyKind


class ExpertKeys(NamedTuple):
  """The config keys that say what experts a family's layers have.

  Attributes:
    number: how many there are.
    normalised: whether the weights of the chosen ones add up to one: a key, or what is always so.
    shared: the width of the expert that every token goes through; empty where there is none.
    shared_gate: whether that is gated.
  """

  number: str
  normalised: str | bool = True
  shared: str = ""
  shared_gate: bool = False


class Spelling(NamedTuple):
  """How a family says with keys of its own what others say with the usual ones.

  Attributes:
    usual: from the contents of its ``config.json``, of which nothing has been checked yet, to the usual keys.
    own: back.
  """

  usual: Callable[[Config], Config]
  own: Callable[[Fields], Fields]


class Family(NamedTuple):
  """What sets a family apart.

  Attributes:
    architecture: the class that transformers, or the checkpoint's own code, loads it with.
    table: its checkpoint's tensors.
    otherwise: the same, of files that hold the experts of a layer in another way; empty where none do.
    fields: fields of `ModelConfig` that are the same in all its models, or functions of their sizes.
    keys: config keys that only some families have.
    experts: the keys of its experts; None where layers have one MLP.
    aliases: its own names of config keys, and the usual ones.
    spelling: what more it says otherwise; None where names are all.
    fixed: config keys of which only some values are implemented.
    required: config keys that must be there, and why.
    defaults: what transformers assumes when a key is absent, where that is not Llama's.
    inert: config keys that change nothing that we compute.
    dropped: patterns of the names of tensors that a language model does not need, and why not.
    activation: the config key of the MLP's activation.
    activations: by the names that its config may give.
    window: whose ``sliding_window`` is: ``all`` layers', or those that ``layer_types`` says; ``optional`` when so does
      ``use_sliding_window``; ``none`` when ``layer_types`` must name none.
    is_local: whether a layer is local when there is no ``layer_types``, from the config's values.
    local_rope: the rotary embedding of local layers: the ``same`` as of others, their ``own``, the others'
      ``unscaled``, the only one there is (``alone``), or none (``without``).
    ropes: the rotary scalings that its code has.
    interleaved: whether neighbouring numbers are rotated together; see `sa_jax.ops.RopeConfig`.
    fixed_stretch: whether ``alpha`` makes the dynamic scaling a fixed one (Hunyuan).
    grows_queries: whether queries grow with their position (Llama 4's, in Ministral 3).
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
    """Whether a tensor of its files has values between queries and keys, so that all are of one width."""
    return any(rule.view and any("v_proj" in path for path, _ in rule.parts) for rule in self.table)
