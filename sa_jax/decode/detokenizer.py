"""Text that grows token by token, and ends where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sa_jax.formats.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
  """Turns tokens into text as they come.

  What it gives, joined, is the text of all tokens, without special ones, up to the first stop string. Text is held back
  while a character is not complete, or while it may be the beginning of a stop string.

  Attributes:
    stops: what ends the text, and is no part of it: strings, or special tokens by name.
    stopped: the stop that has come, or None.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self._tokenizer = tokenizer
    self.stops = tuple(stop for stop in stops if stop)
    self.stopped: str | None = None
    special = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    self._ends: dict[int, str] = {special[stop]: stop for stop in self.stops if stop in special}
    self._tokens: list[int] = []
    # The text of tokens before `_read` has been taken; decoding begins at `_begin`, a little before, as what is around
    # a token may change its text.
    self._begin = self._read = 0
    self._held = ""

  def push(self, tokens: Sequence[int]) -> str:
    """The text that further tokens make certain; nothing once it has stopped."""
    said = ""
    for token in tokens:
      if self.stopped is None:
        said += self._next(int(token))
    return said

  def finish(self) -> str:
    """What was held back, once no more tokens come."""
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
    if whole.endswith(_INCOMPLETE):
      return ""
    if new:
      self._begin, self._read = self._read, len(self._tokens)
    text = self._held + new
    found = [(text.index(stop), stop) for stop in self.stops if stop in text]
    if found:
      at, self.stopped = min(found)
      self._held = ""
      return text[:at]
    keep = max((_overlap(text, stop) for stop in self.stops), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]

  def _decoded(self) -> tuple[str, str]:
    """The text from `_begin` on, and the part of it that has not been taken."""
    taken = self._tokenizer.decode(self._tokens[self._begin : self._read])
    whole = self._tokenizer.decode(self._tokens[self._begin :])
    return whole, whole[len(taken) :]


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of a text are the beginning of a stop string, and not all of it."""
  return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
