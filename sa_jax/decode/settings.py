"""How much is generated, and how it is drawn."""

from __future__ import annotations

import dataclasses

from sa_jax.decode.engine import check_seed
from sa_jax.decode.sampling import Sampler
from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
  """How prompts are continued.

  Attributes:
    max_new_tokens: most tokens to add.
    sampler: how they are drawn.
    seed: of the samples.
  """

  max_new_tokens: int = 24
  sampler: Sampler = dataclasses.field(default_factory=Sampler)
  seed: int = 0

  def check(self, vocab_size: int) -> None:
    """Checks the values, for a model of some vocabulary.

    Raises:
      UserError: if there is nothing to add, a seed is none, or a rule does not fit the vocabulary.
    """
    if self.max_new_tokens < 1:
      raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
    check_seed(self.seed)
    self.sampler.check(vocab_size)


@dataclasses.dataclass(frozen=True)
class TextSettings(Settings):
  """How prompts are continued by text.

  Attributes:
    stops: strings that end a text and are no part of it, wherever tokens begin and end; or special tokens by name.
    chunk: tokens that the device generates between two looks of the host, at which stops are seen.
    slots: texts at once.
  """

  stops: tuple[str, ...] = ()
  chunk: int = 8
  slots: int = 32

  def __post_init__(self) -> None:
    if isinstance(self.stops, str) or not all(isinstance(stop, str) and stop for stop in self.stops):
      raise UserError(f"stops are strings that are not empty, such as ('\\n\\n',); not {self.stops!r}")
    object.__setattr__(self, "stops", tuple(self.stops))
