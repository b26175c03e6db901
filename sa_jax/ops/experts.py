"""Mixtures of experts: each token goes through a few of many MLPs. Dropless and exact: experts have no capacity limit.

Weights are stacked, ``[X, D, F]`` for X experts. Many tokens are sorted by expert and multiplied group by group; for a
few tokens, only the chosen experts' weights are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.ops.grouped import grouped_product
from sa_jax.ops.linear import chosen_down, chosen_gated, has_chosen_kernels

Weights = Mapping[str, Mapping[str, jax.Array]]
"""``gate_proj``, ``up_proj`` and ``down_proj``: each a ``kernel [X, in, out]``, with an optional ``bias [X, out]`` and
optional adapters."""

Gated = Callable[[jax.Array, jax.Array], jax.Array]
"""The last projection's input, from the outputs of ``gate_proj`` and ``up_proj``."""


@dataclasses.dataclass(frozen=True)
class Experts:
  """The experts that replace a layer's MLP.

  Attributes:
    count: number of experts, ``X``; each has the config's ``mlp_dim``.
    chosen: experts per token: those with the highest scores.
    normalised: whether their weights sum to one: the softmax over their scores only. Otherwise the softmax over all
      scores.
    shared_width: width of a shared expert, which every token goes through; 0 for none.
    shared_gate: whether the shared expert's output is multiplied by the sigmoid of its own score (Qwen2-MoE).
  """

  count: int
  chosen: int
  normalised: bool = True
  shared_width: int = 0
  shared_gate: bool = False

  def faults(self) -> list[str]:
    """What is wrong with the values, one line each."""
    wrong = [] if self.count >= 1 else [f"experts.count={self.count} (must be at least 1)"]
    if not 1 <= self.chosen <= max(self.count, 1):
      wrong.append(f"experts.chosen={self.chosen} (must be 1 to count={self.count})")
    if self.shared_width < 0:
      wrong.append(f"experts.shared_width={self.shared_width} (must be a width, or 0 for none)")
    if self.shared_gate and not self.shared_width:
      wrong.append("experts.shared_gate=True (needs shared_width)")
    return wrong

  def expected(self, tokens: int) -> float:
    """Average number of distinct experts that ``tokens`` tokens go through, if each chooses at random."""
    return self.count * (1 - (1 - self.chosen / self.count) ** tokens)


class Routes(NamedTuple):
  """The routing of tokens.

  Attributes:
    experts: int32 ``[..., C]``, indices of each token's experts.
    weights: float32 ``[..., C]``, the factors of their outputs.
  """

  experts: jax.Array
  weights: jax.Array


def route(scores: jax.Array, experts: Experts) -> Routes:
  """The experts with the highest scores, and their weights.

  Args:
    scores: float32 ``[..., X]``, the router's, before any softmax.
    experts: how many are chosen, and whether their weights sum to 1.

  Returns:
    Indices and weights, ``[..., C]`` each, highest score first.
  """
  highest, numbers = jax.lax.top_k(scores, experts.chosen)
  if experts.normalised:
    return Routes(numbers, jax.nn.softmax(highest))
  return Routes(numbers, jnp.exp(highest - jax.nn.logsumexp(scores, axis=-1, keepdims=True)))


def through_experts(
  x: jax.Array,
  routes: Routes,
  weights: Weights,
  gated: Gated,
  first: jax.Array | None = None,
) -> jax.Array:
  """The weighted sum of the outputs of each token's experts.

  Args:
    x: ``[N, D]`` tokens.
    routes: ``[N, C]``.
    weights: weights of all experts, or of a contiguous range.
    gated: such as ``lambda gate, up: f(gate) * up``.
    first: int32 ``[]``, index of the first expert in ``weights``; experts outside the range add nothing. None if
      ``weights`` has all.

  Returns:
    ``[N, D]`` in x's dtype.
  """
  (tokens, chosen), count = routes.experts.shape, weights["down_proj"]["kernel"].shape[0]
  numbers = routes.experts.reshape(-1)
  if first is not None:
    # Tokens of experts on other devices come last, in no group.
    numbers = jnp.where((numbers >= first) & (numbers < first + count), numbers - first, count)
  order = jnp.argsort(numbers, stable=True)
  back = jnp.argsort(order)
  groups = jnp.sum(numbers[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
  # Each index occurs once, so that the gradient of a gather is a gather.
  take = lambda x, indices: x.at[indices].get(unique_indices=True, mode="promise_in_bounds")
  repeated = jnp.broadcast_to(x[:, None], (tokens, chosen, x.shape[1])).reshape(tokens * chosen, -1)
  product = lambda x, kernel: grouped_product(x, kernel, groups)
  of_each = numbers[order]
  bias = lambda bias: bias.at[of_each].get(mode="fill", fill_value=0)
  y = take(_mlp(take(repeated, order), weights, gated, product, bias), back)
  if first is not None:
    y = jnp.where((numbers < count)[:, None], y, jnp.zeros((), y.dtype))
  together = jnp.einsum(
    "ncd,nc->nd",
    y.reshape(tokens, chosen, -1),
    routes.weights.astype(y.dtype),
    preferred_element_type=jnp.float32,
  )
  return together.astype(x.dtype)


def _mlp(
  x: jax.Array,
  weights: Weights,
  gated: Gated,
  product: Callable[[jax.Array, jax.Array], jax.Array],
  bias: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """``down(gated(gate(x), up(x)))``, with biases and adapters, if any."""

  def linear(x: jax.Array, name: str) -> jax.Array:
    kernel, *adapters = (weights[name][each] for each in ("kernel", "lora_a", "lora_b") if each in weights[name])
    y = product(x, kernel)
    y = y + bias(weights[name]["bias"]) if "bias" in weights[name] else y
    return y + product(product(x, adapters[0]), adapters[1]) if adapters else y

  return linear(gated(linear(x, "gate_proj"), linear(x, "up_proj")), "down_proj")


def through_few(
  x: jax.Array,
  routes: Routes,
  weights: Weights,
  gated: Gated,
  kernels: bool,
) -> jax.Array:
  """`through_experts` for a few tokens: reads only the chosen experts' weights, each once.

  Args:
    x: ``[N, D]``.
    routes: ``[N, C]``.
    weights: weights of all experts.
    gated: as in `through_experts`.
    kernels: whether to use kernels, which do not support adapters.

  Returns:
    ``[N, D]`` in x's dtype.
  """
  count = weights["down_proj"]["kernel"].shape[0]
  is_chosen = jnp.any(routes.experts.reshape(-1)[:, None] == jnp.arange(count)[None], axis=0)
  # One place per possible chosen expert; unused places are -1.
  (places,) = jnp.nonzero(is_chosen, size=min(count, routes.experts.size), fill_value=-1)
  places = places.astype(jnp.int32)
  here = routes.experts[None] == places[:, None, None]
  shares = jnp.sum(jnp.where(here, routes.weights[None], 0.0), axis=-1)  # [P, N]
  if kernels:
    of_both = lambda part: [weights[name][part] for name in ("gate_proj", "up_proj") if part in weights[name]]
    hidden = chosen_gated(x, of_both("kernel"), of_both("bias"), places, gated)
    down = weights["down_proj"]
    y = chosen_down(hidden, down["kernel"], places)
    y = y + down["bias"][jnp.maximum(places, 0)][:, None].astype(y.dtype) if "bias" in down else y
  else:
    held = jax.tree.map(lambda array: array[jnp.maximum(places, 0)], {name: dict(weights[name]) for name in weights})
    product = lambda x, kernel: jnp.einsum("...nd,pdf->pnf" if x.ndim == 2 else "pnd,pdf->pnf", x, kernel)
    y = _mlp(x, held, gated, product, lambda bias: bias[:, None])
  # Every expert computes all tokens; its output for a token that did not choose it may be infinite.
  y = jnp.where(here.any(axis=-1)[..., None], y.astype(jnp.float32), 0.0)
  return jnp.einsum("pnd,pn->nd", y, shares).astype(x.dtype)


def has_few_kernels(x: jax.Array, weights: Weights) -> bool:
  """Whether kernels can compute `through_few` of x ``[N, D]`` on the present device."""
  each = [weights[name] for name in ("gate_proj", "up_proj", "down_proj")]
  return all(set(one) <= {"kernel", "bias"} for one in each) and has_chosen_kernels(x, *(one["kernel"] for one in each))


class Balance(NamedTuple):
  """How tokens are distributed over the experts of several layers, as float32 sums over tokens.

  Attributes:
    load_balance: ``[]``, a balancing loss (Fedus et al., arXiv 2101.03961, equation 4) times the number of tokens. The
      loss is least, ``chosen``, if each layer's experts have equal shares of tokens and probabilities.
    z: ``[]``, the squared log-sum-exp of the scores (Zoph et al., arXiv 2202.08906, equation 5).
    tokens: ``[layers, X]``, number of tokens per expert.
  """

  load_balance: jax.Array
  z: jax.Array
  tokens: jax.Array


def balance(scores: jax.Array, experts: Experts, counts: jax.Array) -> Balance:
  """How a batch's tokens are distributed; both losses are means over layers.

  Args:
    scores: the router's, float32 ``[layers, B, T, X]``.
    experts: how experts are chosen.
    counts: bool or float32 ``[B, T]``, which tokens count; padding does not.
  """
  counts = counts.astype(jnp.float32)
  number = counts.sum()
  numbers = route(scores, experts).experts
  went = (numbers[..., None] == jnp.arange(experts.count).reshape(1, 1, 1, 1, -1)).sum(axis=-2)
  tokens = jnp.einsum("lbtx,bt->lx", went.astype(jnp.float32), counts)
  probabilities = jnp.einsum("lbtx,bt->lx", jax.nn.softmax(scores), counts)
  divisor = jnp.maximum(number, 1.0)
  load = experts.count * jnp.sum(tokens * probabilities, axis=-1).mean() / divisor
  z = jnp.einsum("lbt,bt->l", jnp.square(jax.nn.logsumexp(scores, axis=-1)), counts).mean()
  return Balance(load, z, tokens)
