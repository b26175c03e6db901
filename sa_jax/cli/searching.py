"""Shared by the commands that search for a plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from sa_jax.analysis.budget import Budget
from sa_jax.analysis.share import EFFORTS, Effort, EffortName
from sa_jax.cli.common import console
from sa_jax.cli.flags import at_least_one
from sa_jax.cli.opening import Opening
from sa_jax.cli.texts import RowLength

if TYPE_CHECKING:
  from sa_jax.analysis import Text
  from sa_jax.nn import Transformer
  from sa_jax.trees import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searching:
  """A model, texts to evaluate plans on, and search settings."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A dense model: a Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], at_least_one("TEXT")]
  """Text files (or .jsonl with a "text" per line) to fit and evaluate on; all have equal weight."""
  budget: str = "8"
  """A number of followers; or a fraction of the dense cost: kv=80%, flops=95%; or ppl=1.05, the most followers whose
  held-out perplexity is at most this many times the dense model's."""
  effort: EffortName = "good"
  """quick: one minute, little text; good: everything that pays off, on more text; best: a wider search. Sets the
  defaults of the flags below."""
  settings: Annotated[Effort, tyro.conf.arg(name="")] = EFFORTS["good"]
  """How much work to do."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  cutting: Annotated[RowLength, tyro.conf.arg(name="row")] = dataclasses.field(default_factory=RowLength)
  """How to cut rows from texts."""
  record: Path | None = None
  """Store measured plans in this file, so that a resumed search does not repeat them."""

  exact: ClassVar[bool] = True

  def __post_init__(self) -> None:
    Budget.parse(self.budget)  # before anything else is imported or opened

  def run(self) -> None:
    """Runs the command."""
    raise NotImplementedError

  def prepare(self, all_rows: bool = False) -> tuple[Transformer, Params, list[Text]]:
    """The dense model, its parameters in the layer layout, and the texts, with all rows on request."""
    from sa_jax.cli.texts import split_texts

    self.opening.begin()
    tokenizer = self.opening.tokenizer(self.model)
    rows = self.settings.most_rows, self.settings.judging_rows
    texts = split_texts(tokenizer, self.texts, self.cutting, *rows, all_rows)
    for text in texts:
      described = self.cutting.describe(tokenizer, len(text.calibration) + len(text.judging))
      console.print(f"{text.name}: {described}, {len(text.judging)} of them held out")
    return *self.opening.open_dense(self.model), texts


def with_effort(command: type[Searching], arguments: Sequence[str]) -> type[Searching]:
  """The command, with the requested effort's settings as defaults of the other flags."""
  asked = "good"
  for word, following in itertools.pairwise((*arguments, "")):
    flag, equals, value = word.partition("=")
    if flag == "--effort":
      asked = value if equals else following
  effort = next((effort for name, effort in EFFORTS.items() if name == asked), EFFORTS["good"])
  settings = ("settings", Annotated[Effort, tyro.conf.arg(name="")], dataclasses.field(default=effort))
  return dataclasses.make_dataclass(
    command.__name__, [settings], bases=(command,), namespace={"__doc__": command.__doc__}, frozen=True, kw_only=True
  )
