"""``sa-jax perplexity``: what plans cost in quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax.cli.common import exact_float32, plans_asked, show_table, write_json
from sa_jax.cli.opening import Opening
from sa_jax.cli.progress import progress
from sa_jax.cli.texts import RowLength, rows_of_texts
from sa_jax.config import CacheDtype, FloatDtype
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_writable
from sa_jax.plan import as_plan

if TYPE_CHECKING:
  from sa_jax.formats.load import Layout


@dataclasses.dataclass(frozen=True)
class PerplexityOf:
  """Measure a model's perplexity on a text, under one or more plans."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id such as org/model."""
  text: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEXT")]
  """A UTF-8 text file, or a .jsonl file with a "text" per line."""
  plan: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLAN ...")] = ()
  """One or more plans, such as: dense 26:27-28 3:4; None for the checkpoint's own plan."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  cutting: Annotated[RowLength, tyro.conf.arg(name="row")] = dataclasses.field(default_factory=RowLength)
  """Rows, scored independently."""
  rows: Count | None = None
  """Score only the first rows of the text; None scores all."""
  batch_size: Count = 1
  """Rows per batch."""
  dtype: FloatDtype | None = "float32"
  """Type of parameters and activations; None for the checkpoint's."""
  cache_dtype: CacheDtype = None
  """Attend to keys and values as an int8 or int4 cache holds them; None for the activations' type."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def __post_init__(self) -> None:
    check_fields(self, "perplexity")

  @property
  def exact(self) -> bool:
    """Whether the flags select float32."""
    return self.dtype == "float32"

  def run(self) -> None:
    """Prints one row per plan."""
    from sa_jax import perplexity

    check_writable(self.json)
    self.opening.begin()
    config = self.opening.config(self.model)
    for text in plans_asked(self.plan):
      as_plan(text, config.num_layers)
    tokenizer = self.opening.tokenizer(self.model)
    (tokens,) = rows_of_texts(tokenizer, [self.text], self.cutting, self.rows)
    results = {}
    layout: Layout = "runs" if self.cache_dtype is None else "layers"
    for asked in dict.fromkeys(plans_asked(self.plan)):
      model, params = self.opening.open(self.model, asked, self.dtype, layout, self.cache_dtype)
      plan = asked or str(model.plan)
      with progress(f"scoring, {plan}") as report, exact_float32(model.config.dtype):
        results[plan] = perplexity(model, params, tokens, batch_size=self.batch_size, progress=report)
    show_table(
      f"{self.text.name}: {self.cutting.describe(tokenizer, len(tokens))}",
      ["plan", "perplexity", "nats per token"],
      [[plan, f"{result.perplexity:.3f}", f"{result.loss:.4f}"] for plan, result in results.items()],
    )
    write_json(self.json, {plan: result._asdict() for plan, result in results.items()})
