"""Module calls that type checkers can check."""

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
  """Calls a module's method with its parameters, for example ``apply(model, params, Transformer.hidden, tokens)``.

  This is ``module.apply({"params": params}, …, method=method)`` with the method's types: a misspelt name, a wrong
  argument or a wrong use of the result is a type error. The method is that of the named class, not of a subclass.
  """
  return cast(_Result, nn.apply(lambda bound: method(bound, *args, **kwargs), module)({"params": params}))
