"""Ridge regression from sums over tokens, used by refit and head alignment."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_jax.programs import program

product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
"""`jnp.einsum` in full float32; accelerators use less precision by default."""


_SILENT = 1e-20
"""Inputs with less energy than this, such as those of a layer whose values are 0, leave the prior unchanged: a penalty
relative to their own energy would vanish in float32."""


class Sums(NamedTuple):
  """Sufficient statistics of ridge regression, summed over tokens in float32.

  Attributes:
    gram: ``[X, X]``, products of inputs.
    cross: ``[X, D]``, products of inputs and targets.
    energy: scalar, sum of squared targets.
  """

  gram: jax.Array
  cross: jax.Array
  energy: jax.Array

  @classmethod
  def of(cls, inputs: jax.Array, targets: jax.Array) -> Sums:
    """Sums for inputs ``[..., X]`` and targets ``[..., D]``."""
    x = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    y = targets.reshape(-1, targets.shape[-1]).astype(jnp.float32)
    return cls(product("TX,TZ->XZ", x, x), product("TX,TD->XD", x, y), jnp.sum(jnp.square(y)))

  def __add__(self, other: Sums) -> Sums:  # type: ignore[override]
    return _added(self, other)

  def error(self, weights: jax.Array) -> jax.Array:
    """Squared error of the linear map ``[X, D]``, summed over tokens and outputs."""
    inner = product("XD,XD->", weights, 2 * self.cross - product("XZ,ZD->XD", self.gram, weights))
    return self.energy - inner


@program()
def _added(one: Sums, other: Sums) -> Sums:
  return jax.tree.map(jnp.add, one, other)


def gain(sums: Sums, prior: jax.Array, ridge: float | jax.Array) -> jax.Array:
  """Reduction of the penalised error by `solve`: ``‖L⁻¹ R‖²``, R the prior's residual, L the Cholesky factor."""
  factor = jnp.linalg.cholesky(_penalised(sums.gram, ridge))
  residual = sums.cross - product("XZ,ZD->XD", sums.gram, prior)
  return jnp.sum(jnp.square(jax.scipy.linalg.solve_triangular(factor, residual, lower=True)))


def _penalised(gram: jax.Array, ridge: float | jax.Array) -> jax.Array:
  size = gram.shape[0]
  mean = jnp.maximum(jnp.trace(gram) / size, _SILENT)
  return gram + ridge * mean * jnp.eye(size, dtype=jnp.float32)


@program()
def solve(sums: Sums, prior: jax.Array, ridge: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Ridge regression towards a prior.

  Args:
    sums: sums over the data.
    prior: ``[X, D]``, or the same number of elements, the weights to stay near.
    ridge: penalty relative to the mean diagonal of ``sums.gram``.

  Returns:
    float32 ``[X, D]`` weights whose error is at most the prior's, and an estimate of the reciprocal condition number
    (from the Cholesky factor's diagonal; NaN if the matrix is not positive definite in float32).
  """
  prior = prior.astype(jnp.float32).reshape(sums.cross.shape)
  matrix = _penalised(sums.gram, ridge)
  factor = jax.scipy.linalg.cho_factor(matrix)
  residual = sums.cross - product("XZ,ZD->XD", sums.gram, prior)
  step = jax.scipy.linalg.cho_solve(factor, residual)
  # One step of iterative refinement recovers the precision that the factor lost in float32.
  step = step + jax.scipy.linalg.cho_solve(factor, residual - product("XZ,ZD->XD", matrix, step))
  diagonal = jnp.diagonal(factor[0])
  return prior + step, jnp.square(diagonal.min() / diagonal.max())


@program()
def relative_error(sums: Sums, weights: jax.Array) -> jax.Array:
  """`Sums.error` of weights as in `solve`, divided by the targets' energy."""
  weights = weights.astype(jnp.float32).reshape(sums.cross.shape)
  error = jnp.maximum(sums.error(weights), 0.0)  # a difference of sums, which rounding may make negative
  return error / jnp.maximum(sums.energy, jnp.finfo(jnp.float32).tiny)


def total(parts: Iterable[Sums]) -> Sums:
  """The total of one or more chunks' sums.

  Chunks are added one by one, so that only one chunk's activations are in memory.
  """
  return functools.reduce(Sums.__add__, parts)
