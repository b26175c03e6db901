"""How text-generating commands open a model and sample."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sa_jax.cli.common import say
from sa_jax.cli.opening import Opening
from sa_jax.config import CacheDtype, FloatDtype
from sa_jax.errors import UserError
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax import Tokenizer, Transformer
  from sa_jax.decode import Sampler, TextSettings


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
  min_p: float | None = None
  """Sample from the tokens that are at least this fraction as likely as the likeliest."""
  repetition_penalty: float | None = None
  """Makes tokens of the prompt and the answer less likely; 1 changes nothing."""
  seed: int = 0
  """Sampling seed."""
  stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
  """Texts, or special tokens by name, that end a continuation and are not part of it."""

  def check(self) -> None:
    """Checks the values, before a model is opened.

    Raises:
      UserError: if a value is invalid, or has no effect together with the others.
    """
    if "" in self.stop:
      raise UserError("each `stop` must have text: leave the empty one out")
    self.settings()

  def settings(self) -> TextSettings:
    """The settings for `sa_jax.decode`."""
    from sa_jax.decode import TextSettings

    return TextSettings(self.max_new_tokens, self.sampler(), self.seed, self.stop)

  def sampler(self) -> Sampler:
    """The sampler for these settings."""
    from sa_jax.decode.processors import RepetitionPenalty
    from sa_jax.decode.sampling import Sampler

    penalties = () if self.repetition_penalty is None else (RepetitionPenalty(self.repetition_penalty),)
    return Sampler(self.temperature, self.top_k, self.top_p, self.min_p, penalties)

  def stream(self, model: Transformer, params: Params, prompt: Sequence[int]) -> Iterator[int]:
    """Yields new tokens for one prompt as they are generated."""
    from sa_jax.decode import stream

    for new in stream(model, params, prompt, self.settings()):
      yield from new


TemplateOptions = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")]


def template_options(words: Sequence[str]) -> dict[str, Any]:
  """Parses extra chat-template variables such as ``enable_thinking=false``.

  Values are parsed as JSON, otherwise kept as strings.

  Raises:
    UserError: if a word has a different form.
  """
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


def say_tokens(tokenizer: Tokenizer, coming: Iterable[int], stops: Sequence[str]) -> tuple[str, list[int]]:
  """Prints text as its tokens arrive, up to a stop; returns it, and the tokens up to the one that completes the stop.

  Args:
    tokenizer: of the model.
    coming: the tokens; none is read after a stop.
    stops: texts, or special tokens by name, that end the text and are not part of it.
  """
  from sa_jax.decode import Detokenizer

  detokenizer = Detokenizer(tokenizer, stops)
  tokens: list[int] = []
  pieces: list[str] = []

  def take(piece: str) -> None:
    if piece:
      pieces.append(piece)
      say(piece, end="")

  for token in coming:
    tokens.append(int(token))
    take(detokenizer.push([token]))
    if detokenizer.stopped is not None:
      break
  take(detokenizer.finish())
  say("")
  return "".join(pieces), tokens
