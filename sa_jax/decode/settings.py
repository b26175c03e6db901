"""Generation length and sampling settings."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from sa_jax.decode.sampling import Sampler
from sa_jax.fields import Constraint, Count, Seed, check_fields


@dataclasses.dataclass(frozen=True)
class Settings:
  """How prompts are continued.

  Attributes:
    max_new_tokens: max new tokens per prompt.
    sampler: how tokens are sampled.
    seed: seed of the samples.

  Raises:
    UserError: if there is nothing to generate, or a value is out of range.
  """

  max_new_tokens: Count = 24
  sampler: Sampler = dataclasses.field(default_factory=Sampler)
  seed: Seed = 0

  def __post_init__(self) -> None:
    check_fields(self, "generation")


@dataclasses.dataclass(frozen=True)
class TextSettings(Settings):
  """How prompts are continued as text.

  Attributes:
    stops: strings, or special tokens by name, that end a text and are not part of it; strings may span tokens.
    chunk: tokens generated on the device per host round trip, where stops are detected.
    slots: max texts generated concurrently.
  """

  stops: tuple[Annotated[str, Constraint(bool, "a non-empty string")], ...] = ()
  chunk: Count = 8
  slots: Count = 32
