"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): ``W + (alpha / rank) A B`` with W frozen.

Adapters are a separate tree, shaped like the model's parameters; `attach` puts them where the modules look for them.
Nothing as large as W is computed or stored for them, not even W's gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError
from sa_jax.fields import Count, Positive, check_fields
from sa_jax.nn import Transformer
from sa_jax.nn.axes import WithAxes, bare
from sa_jax.sharding import abstract_params
from sa_jax.train.batch import Batch
from sa_jax.train.step import LossSums, Objective
from sa_jax.trees import Tree

# number of input axes of each projection's kernel
INPUT_AXES = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 1, "up_proj": 1, "down_proj": 1}
_STACKED = ("groups", "followers", "experts")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which projections have adapters, and of what rank.

  Raises:
    UserError: if there is no such projection, or a number is not positive.
  """

  rank: Count = 16
  """Rank of an adapter, the product of two narrow matrices."""
  alpha: Positive = 32.0
  """An adapter is scaled by alpha / rank."""
  targets: tuple[str, ...] = tuple(INPUT_AXES)
  """Names of projections. Followers have no q_proj and k_proj, and hence no adapters of these."""

  def __post_init__(self) -> None:
    check_fields(self, "LoRA")
    if not self.targets or (unknown := sorted(set(self.targets) - set(INPUT_AXES))):
      named = f"not {unknown}" if self.targets else "not empty"
      raise UserError(f"LoRA: targets must be some of {', '.join(INPUT_AXES)}, {named}")

  @property
  def scale(self) -> float:
    """The factor on ``A B``."""
    return self.alpha / self.rank


def abstract_adapters(model: Transformer, config: LoraConfig, *, layout: str = "runs", boxed: bool = False) -> Tree:
  """The shapes of a model's adapters.

  Args:
    model: its projections are adapted.
    config: targets and rank.
    layout: ``runs`` or ``layers``, the parameters' layout.
    boxed: whether to include logical axes, as `sa_jax.sharding.tree_shardings` takes them.

  Returns:
    A tree like the parameters', with a float32 ``lora_a`` ``[..., inputs, rank]`` and a ``lora_b``
    ``[..., rank, outputs]`` per adapted kernel; inputs and outputs are one axis or two, as in the kernel.
  """

  def of(node: Tree) -> Tree:
    found = {}
    for name, child in node.items():
      if name in config.targets:
        found[name] = _pair(child["kernel"], INPUT_AXES[name], config.rank)
      elif isinstance(child, dict) and (inner := of(child)):
        found[name] = inner
    return found

  tree = of(abstract_params(model, layout=layout, boxed=True))
  return tree if boxed else bare(tree)


def init_adapters(model: Transformer, config: LoraConfig, key: jax.Array, *, layout: str = "runs") -> Tree:
  """Initial adapters, without effect: A is random with variance 1 / inputs, B is zero (Hu et al., arXiv 2106.09685).

  Args:
    model: as in `abstract_adapters`.
    config: as in `abstract_adapters`.
    key: random key for A.
    layout: ``runs`` or ``layers``, the parameters' layout.

  Returns:
    A tree like that of `abstract_adapters`, of arrays.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_adapters(model, config, layout=layout, boxed=False))

  def init(path: Any, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    if path[-1].key == "lora_b":
      return jnp.zeros(leaf.shape, leaf.dtype)
    inputs = math.prod(leaf.shape[-1 - INPUT_AXES[path[-2].key] : -1])
    return jax.random.normal(key, leaf.shape, leaf.dtype) / math.sqrt(inputs)

  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [init(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)])


def attach(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
  """Parameters that apply the adapters: the frozen ones, not copied, together with the adapters.

  Args:
    params: frozen, in either layout.
    adapters: in the same layout, as from `init_adapters`.
    config: its scale is ``alpha / rank``.
  """
  if "lora_a" in adapters:
    return {**params, "lora_a": adapters["lora_a"], "lora_b": config.scale * adapters["lora_b"]}
  return {**params, **{name: attach(params[name], child, config) for name, child in adapters.items()}}


def merge(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
  """Parameters of the plain model, ``W + (alpha / rank) A B``, for export.

  Args:
    params: in either layout.
    adapters: in the same layout, as from `init_adapters`.
    config: for the scale.

  Returns:
    Parameters in that layout, each in its original dtype.
  """

  def merged(params: Tree, adapters: Tree, name: str) -> Tree:
    if "lora_a" in adapters:
      return {**params, "kernel": _merged(params["kernel"], adapters, INPUT_AXES[name], config.scale)}
    return {**params, **{name: merged(params[name], child, name) for name, child in adapters.items()}}

  return merged(params, adapters, "")


def adapted(
  objective: Objective, config: LoraConfig, base: Callable[[Tree], Tree] = lambda frozen: frozen
) -> Objective:
  """Turns an objective over the model's parameters into one over adapters.

  Args:
    objective: over the model's parameters.
    config: the adapters' config.
    base: extracts the model's frozen parameters from what is frozen; by default, all of it.
  """

  def of_adapters(params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> LossSums:
    return objective(attach(base(frozen), params, config), frozen, batch, step)

  return of_adapters


def _pair(kernel: WithAxes, inputs: int, rank: int) -> dict[str, Any]:
  """The adapters of a kernel."""
  names, shape = kernel.names, kernel.value.shape
  stacked = sum(name in _STACKED for name in names)
  middle = stacked + inputs
  box = lambda shape, names: WithAxes(jax.ShapeDtypeStruct(shape, jnp.float32), names)
  return {
    "lora_a": box((*shape[:middle], rank), (*names[:middle], None)),
    "lora_b": box((*shape[:stacked], rank, *shape[middle:]), (*names[:stacked], None, *names[middle:])),
  }


def _merged(kernel: jax.Array, adapters: Tree, inputs: int, scale: float) -> jax.Array:
  a, b = (jnp.asarray(adapters[name], jnp.float32) for name in ("lora_a", "lora_b"))
  stacked = a.ndim - inputs - 1
  flat = lambda x, axes: x.reshape(*x.shape[:stacked], *axes)
  low, high = flat(a, (-1, a.shape[-1])), flat(b, (b.shape[stacked], -1))
  update = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)
  return (jnp.asarray(kernel, jnp.float32) + scale * update).astype(kernel.dtype)
