"""What the commands that search for a plan have in common."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from sa_jax.cli.common import console
from sa_jax.cli.texts import RowLength

if TYPE_CHECKING:
  from sa_jax.analysis import Text
  from sa_jax.analysis.share import Search
  from sa_jax.nn import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searching:
  """A model, the texts that plans are judged by, and how to search."""

  model: tyro.conf.Positional[Path]
  """A dense Hugging Face folder, GGUF file or sa_jax checkpoint."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT ...")]
  """Text files (or .jsonl with a "text" a line) to calibrate on and judge by; each counts alike."""
  budget: str = "8"
  """A number of followers, or what may remain of the dense cost: kv=80%, flops=95%."""
  strategy: Literal["dp", "greedy", "beam", "spans"] = "dp"
  """dp is the cheapest; greedy and beam measure every candidate, or a shortlist; spans is the paper's recipe."""
  reach: int = 5
  """dp, and greedy and beam with a shortlist: farthest anchor considered, in layers before the follower."""
  width: int = 4
  """beam: plans kept at each step."""
  shortlist: int | None = None
  """greedy, beam: candidates measured at each step; None measures all."""
  swaps: int = 0
  """dp: swaps to measure after it."""
  exclude: tuple[int, ...] = ()
  """Layers that stay anchors."""
  cutting: RowLength = dataclasses.field(default_factory=RowLength)
  """Rows."""
  calibration_rows: int = 8
  """Rows of each text to fit to."""
  judging_rows: int = 4
  """Further rows of each text to measure on."""

  exact: ClassVar[bool] = True

  def prepare(self) -> tuple[Transformer, Any, list[Text], int, Search]:
    """The dense model and its parameters in the layer layout, the texts, how many layers follow, and how to search."""
    from sa_jax.analysis import search
    from sa_jax.analysis.share import Search
    from sa_jax.cli.texts import open_dense, split_texts
    from sa_jax.formats import load_tokenizer

    how = Search(
      strategy=self.strategy,
      reach=self.reach,
      width=self.width,
      shortlist=self.shortlist,
      swaps=self.swaps,
      excluded=self.exclude,
    )
    tokenizer = load_tokenizer(self.model)
    texts = split_texts(tokenizer, self.texts, self.cutting, self.calibration_rows, self.judging_rows)
    console.print(f"{self.calibration_rows} + {self.judging_rows} {self.cutting.describe(tokenizer)} of each text")
    model, params = open_dense(self.model)
    return model, params, texts, search.followers_for(model.config, self.budget, self.cutting.length), how
