"""Text in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sa_jax.decode.admission import Request
from sa_jax.decode.batcher import Batcher
from sa_jax.decode.detokenizer import Detokenizer
from sa_jax.decode.engine import capacity_for
from sa_jax.decode.serving import Serving
from sa_jax.decode.settings import TextSettings
from sa_jax.nn import Transformer
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax.formats.tokenizer import Tokenizer


class Text(NamedTuple):
  """The continuation of a prompt.

  Attributes:
    text: up to the stop, without special tokens.
    tokens: up to the token that completes the stop, or the end token, or the last one.
    stop: the stop that was reached, or None.
    log_probs: of the tokens, if the sampler returns them; otherwise empty.
  """

  text: str
  tokens: list[int]
  stop: str | None
  log_probs: list[float]


Prompt = str | Sequence[int]
"""A text, encoded with the tokenizer's defaults, or tokens."""


def stream_text(
  model: Transformer, params: Params, tokenizer: Tokenizer, prompt: Prompt, how: TextSettings = TextSettings()
) -> Iterator[str]:
  """Continues a prompt and yields its text as it is generated; joined, it equals `continue_texts` for that prompt.

  Args:
    model: from `sa_jax.from_pretrained`.
    params: in the layer layout; the run layout needs a second copy of the weights.
    tokenizer: from `sa_jax.load_tokenizer`.
    prompt: a text or tokens.
    how: how to continue it.

  Raises:
    UserError: see `sa_jax.generate`.
  """
  work = _Work(model, params, tokenizer, [prompt], dataclasses.replace(how, slots=1))
  (detokenizer,) = work.detokenizers
  for _ in work:
    if work.new[0]:
      yield work.new[0]
    if detokenizer.stopped is not None:
      return
  if rest := detokenizer.finish():
    yield rest


def continue_texts(
  model: Transformer,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Prompt],
  how: TextSettings = TextSettings(),
) -> list[Text]:
  """Continues prompts; arguments as in `stream_text`. A stopped text frees its slot for the next prompt."""
  work = _Work(model, params, tokenizer, prompts, how)
  texts = [""] * len(prompts)
  for _ in work:
    texts = [text + new for text, new in zip(texts, work.new, strict=True)]
  return [
    Text(text + each.finish(), request.tokens, each.stopped, request.log_probs)
    for text, each, request in zip(texts, work.detokenizers, work.requests, strict=True)
  ]


class _Work:
  """Prompts in a batch. Each iteration decodes one chunk; ``new`` holds each prompt's new text."""

  def __init__(
    self, model: Transformer, params: Params, tokenizer: Tokenizer, prompts: Sequence[Prompt], how: TextSettings
  ):
    encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=1)
    capacity = capacity_for(max(1, longest + how.max_new_tokens - 1))
    serving = Serving(slots=max(1, min(how.slots, len(encoded))), capacity=capacity, chunk=how.chunk)
    self._batcher = Batcher(model, params, serving, sampler=how.sampler)
    self.requests: list[Request] = [
      self._batcher.submit(np.asarray(row), how.max_new_tokens, seed=how.seed, row=number)
      for number, row in enumerate(encoded)
    ]
    self.detokenizers = [Detokenizer(tokenizer, how.stops) for _ in encoded]
    self.new = [""] * len(encoded)

  def __iter__(self) -> Iterator[None]:
    advance = self._batcher.enter
    while self._batcher.busy:
      news, advance = advance(), self._batcher.step
      self.new = [self._read(number, news.get(request, [])) for number, request in enumerate(self.requests)]
      yield

  def _read(self, number: int, tokens: Sequence[int]) -> str:
    """A request's new text; at a stop it is cancelled, and later tokens are dropped."""
    request, detokenizer = self.requests[number], self.detokenizers[number]
    said = ""
    for at, token in enumerate(tokens):
      said += detokenizer.push([token])
      if detokenizer.stopped is not None:
        kept = len(request.tokens) - len(tokens) + at + 1
        del request.tokens[kept:], request.log_probs[kept:]
        self._batcher.cancel(request)
        break
    return said
