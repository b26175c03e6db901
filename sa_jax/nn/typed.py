"""Calls of modules that type checkers can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

import flax.linen as nn

from sa_jax.trees import Params

_Module = TypeVar("_Module", bound=nn.Module)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def apply(
  module: _Module,
  params: Params,
  method: Callable[Concatenate[_Module, _Arguments], _Result],
  *args: _Arguments.args,
  **kwargs: _Arguments.kwargs,
) -> _Result:
  """A module's method with its parameters, for example ``apply(model, params, Transformer.hidden, tokens)``.

  It is ``module.apply({"params": params}, …, method=method)`` with the types of the method: a misspelt name, a wrong
  argument and a wrong use of the result are errors of types. Methods are those of the class that is named.
  """
  return cast(_Result, nn.apply(lambda bound: method(bound, *args, **kwargs), module)({"params": params}))
