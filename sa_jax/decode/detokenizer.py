"""Incremental detokenisation, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sa_jax.formats.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
  """Turns tokens into text incrementally.

  Its outputs, joined, are the text of all tokens, without special tokens, up to the first stop string. Text is held
  back while a character is incomplete, or while it may be the start of a stop string.

  Attributes:
    stops: strings, or special tokens by name, that end the text and are not part of it.
    stopped: the stop that was reached, or None.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self._tokenizer = tokenizer
    self.stops = tuple(stop for stop in stops if stop)
    self.stopped: str | None = None
    special = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    self._ends: dict[int, str] = {special[stop]: stop for stop in self.stops if stop in special}
    self._tokens: list[int] = []
    # The text of tokens before `_read` has been returned; decoding starts a little earlier, at `_begin`, because a
    # token's text may depend on its context.
    self._begin = self._read = 0
    self._held = ""

  def push(self, tokens: Sequence[int]) -> str:
    """The text that is final after further tokens; empty once stopped."""
    said = ""
    for token in tokens:
      if self.stopped is None:
        said += self._next(int(token))
    return said

  def finish(self) -> str:
    """The text held back, when there are no more tokens."""
    if self.stopped is not None:
      return ""
    said = self._held + self._decoded()[1]
    self._held, self._begin, self._read = "", len(self._tokens), len(self._tokens)
    return said

  def _next(self, token: int) -> str:
    if token in self._ends:
      said = self.finish()
      self.stopped = self._ends[token]
      return said
    self._tokens.append(token)
    whole, new = self._decoded()
    incomplete = whole.endswith(_INCOMPLETE)
    text = self._held + new.rstrip(_INCOMPLETE) if incomplete else self._held + new
    found = [(text.index(stop), stop) for stop in self.stops if stop in text]
    if found:
      at, self.stopped = min(found)
      self._held = ""
      return text[:at]
    if incomplete:
      return ""
    if new:
      self._begin, self._read = self._read, len(self._tokens)
    keep = max((_overlap(text, stop) for stop in self.stops), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]

  def _decoded(self) -> tuple[str, str]:
    """The text from `_begin` on, and the part of it not yet returned."""
    taken = self._tokenizer.decode(self._tokens[self._begin : self._read])
    whole = self._tokenizer.decode(self._tokens[self._begin :])
    return whole, whole[len(taken) :]


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of a text are a proper prefix of a stop string."""
  return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
