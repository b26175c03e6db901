"""How text-generating commands open a model and sample."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sa_jax.cli.common import say
from sa_jax.cli.opening import Opening
from sa_jax.config import CacheDtype, FloatDtype
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax import Tokenizer, Transformer
  from sa_jax.decode import Sampler, Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOpening(Opening):
  """How to open the model for generation."""

  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the checkpoint's own plan."""
  dtype: FloatDtype | None = None
  """Type of parameters and activations; None for the checkpoint's."""
  cache_dtype: CacheDtype = None
  """int8 halves the cache relative to bfloat16, int4 quarters it, approximately; None for the activations' type."""

  def ready(self, model: Path) -> tuple[Transformer, Params]:
    """The model, and its parameters in the layer layout."""
    return self.open(model, self.plan, self.dtype, cache_dtype=self.cache_dtype)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample tokens."""

  max_new_tokens: int = 128
  """Maximum number of new tokens."""
  temperature: float = 0.0
  """0 takes the most likely token."""
  top_k: int | None = None
  """Sample from the k most likely tokens."""
  top_p: float | None = None
  """Sample from the smallest set of tokens whose probability reaches p."""
  seed: int = 0
  """Sampling seed."""

  def check(self) -> None:
    """Checks the values, before a model is opened.

    Raises:
      UserError: if a value is invalid, or has no effect together with the others.
    """
    self.settings()

  def settings(self) -> Settings:
    """The settings for `sa_jax.decode.stream`."""
    from sa_jax.decode.settings import Settings

    return Settings(self.max_new_tokens, self.sampler(), self.seed)

  def sampler(self) -> Sampler:
    """The sampler for these settings."""
    from sa_jax.decode.sampling import Sampler

    return Sampler(self.temperature, self.top_k, self.top_p)

  def stream(self, model: Transformer, params: Params, prompt: Sequence[int]) -> Iterator[list[int]]:
    """Yields new tokens for one prompt as they are generated."""
    from sa_jax.decode import stream

    return stream(model, params, prompt, self.settings())


TemplateOptions = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")]


def template_options(words: Sequence[str]) -> dict[str, Any]:
  """Parses extra chat-template variables such as ``enable_thinking=false``.

  Values are parsed as JSON, otherwise kept as strings.

  Raises:
    UserError: if a word has a different form.
  """
  from sa_jax.errors import UserError

  options: dict[str, Any] = {}
  for word in words:
    name, equals, value = word.partition("=")
    if not equals or not name.isidentifier() or name == "messages":
      raise UserError(f"the option {word!r} must look like enable_thinking=false (`options`)")
    try:
      options[name] = json.loads(value)
    except ValueError:
      options[name] = value
  return options


def say_tokens(tokenizer: Tokenizer, coming: Iterator[list[int]]) -> list[int]:
  """Prints text as its tokens arrive, and returns the tokens."""
  from sa_jax.decode import Detokenizer

  tokens: list[int] = []
  text = Detokenizer(tokenizer)
  for new in coming:
    tokens += new
    say(text.push(new), end="")
  say(text.finish())
  return tokens
