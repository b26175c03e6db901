"""How much is generated, and how it is drawn."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from sa_jax.decode.sampling import Sampler
from sa_jax.fields import Count, Seed, Such, check_fields


@dataclasses.dataclass(frozen=True)
class Settings:
  """How prompts are continued.

  Attributes:
    max_new_tokens: most tokens to add.
    sampler: how they are drawn.
    seed: of the samples.

  Raises:
    UserError: if there is nothing to add, or a value is out of range.
  """

  max_new_tokens: Count = 24
  sampler: Sampler = dataclasses.field(default_factory=Sampler)
  seed: Seed = 0

  def __post_init__(self) -> None:
    check_fields(self, "generation")


@dataclasses.dataclass(frozen=True)
class TextSettings(Settings):
  """How prompts are continued by text.

  Attributes:
    stops: strings that end a text and are no part of it, wherever tokens begin and end; or special tokens by name.
    chunk: tokens that the device generates between two looks of the host, at which stops are seen.
    slots: texts at once.
  """

  stops: tuple[Annotated[str, Such(bool, "a text that is not empty")], ...] = ()
  chunk: Count = 8
  slots: Count = 32
