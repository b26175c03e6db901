"""What the commands that search for a plan have in common."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from sa_jax.cli.common import console
from sa_jax.cli.texts import RowLength

if TYPE_CHECKING:
  from sa_jax.analysis import Text
  from sa_jax.analysis.share import Effort
  from sa_jax.nn import Transformer
  from sa_jax.trees import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searching:
  """A model, the texts that plans are judged by, and how to search."""

  model: tyro.conf.Positional[Path]
  """A dense Hugging Face folder, GGUF file or sa_jax checkpoint."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT ...")]
  """Text files (or .jsonl with a "text" a line) to calibrate on and judge by; each counts alike."""
  budget: str = "8"
  """A number of followers, or what may remain of the dense cost: kv=80%, flops=95%."""
  effort: Literal["quick", "good", "best"] = "good"
  """quick takes a minute and little text, good what the published results take, best a wider search. It sets what is
  not given of the flags below."""
  strategy: Literal["dp", "greedy", "beam", "spans"] | None = None
  """dp is the cheapest; greedy and beam measure every candidate, or a shortlist; spans is the paper's recipe."""
  reach: int | None = None
  """dp, and greedy and beam with a shortlist: farthest anchor considered, in layers before the follower."""
  width: int | None = None
  """beam: plans kept at each step."""
  shortlist: int | None = None
  """greedy, beam: candidates measured at each step; None measures all."""
  swaps: int | None = None
  """dp: swaps to measure after it."""
  exclude: tuple[int, ...] = ()
  """Layers that stay anchors."""
  cutting: RowLength = dataclasses.field(default_factory=RowLength)
  """Rows."""
  calibration_rows: int | None = None
  """Rows of each text to fit to; if not given, as many as the text has, up to what the effort takes."""
  judging_rows: int | None = None
  """Further rows of each text to measure on."""

  exact: ClassVar[bool] = True

  def settings(self) -> Effort:
    """The effort, with the flags that are given."""
    from sa_jax.analysis.share import EFFORTS

    effort = EFFORTS[self.effort]
    given = {name: getattr(self, name) for name in ("strategy", "reach", "width", "shortlist", "swaps")}
    how = dataclasses.replace(
      effort.search, excluded=self.exclude, **{name: value for name, value in given.items() if value is not None}
    )
    rows = {name: getattr(self, name) or getattr(effort, name) for name in ("calibration_rows", "judging_rows")}
    return dataclasses.replace(effort, search=how, **rows)

  def prepare(self) -> tuple[Transformer, Params, list[Text], int]:
    """The dense model and its parameters in the layer layout, the texts, and how many layers follow."""
    from sa_jax.analysis import search
    from sa_jax.cli.texts import open_dense, split_texts
    from sa_jax.formats import load_tokenizer

    tokenizer, effort = load_tokenizer(self.model), self.settings()
    wanted = effort.calibration_rows, effort.judging_rows
    texts = split_texts(tokenizer, self.texts, self.cutting, *wanted, at_most=self.calibration_rows is None)
    described = self.cutting.describe(tokenizer)
    for text in texts:
      console.print(f"{text.name}: {len(text.calibration)} + {len(text.judging)} {described}")
    model, params = open_dense(self.model)
    return model, params, texts, search.followers_for(model.config, self.budget, self.cutting.length)
