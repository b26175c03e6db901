"""``sa-jax refit``: recover quality lost to a plan, in closed form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from sa_jax.analysis.refit import Refit
from sa_jax.cli.common import exact_float32, show_table, tell, write_json
from sa_jax.cli.flags import at_least_one
from sa_jax.cli.opening import Opening
from sa_jax.cli.texts import RowLength
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_absent, check_writable


@dataclasses.dataclass(frozen=True)
class RefitModel:
  """Refit a plan's followers to the dense model on calibration text, without training, and save a checkpoint."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A dense model: a Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id."""
  plan: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PLAN")]
  """Which layers share, such as 22:23-26."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], at_least_one("TEXT")]
  """Text files (or .jsonl with a "text" per line) to calibrate on."""
  out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
  """The checkpoint to write, which must not exist."""
  how: Annotated[Refit, tyro.conf.arg(name="refit")] = dataclasses.field(default_factory=lambda: Refit(maps=True))
  """How to refit."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  cutting: Annotated[RowLength, tyro.conf.arg(name="row")] = dataclasses.field(default_factory=RowLength)
  """How to cut rows from texts."""
  rows: Count = 16
  """Rows of each text."""
  dtype: FloatDtype = "bfloat16"
  """Type of the stored parameters."""
  json: Path | None = None
  """Also write the errors to this file."""

  exact: ClassVar[bool] = True

  def __post_init__(self) -> None:
    check_fields(self, "refit")

  @exact_float32()
  def run(self) -> None:
    """Prints errors before and after, and saves."""
    import numpy as np

    from sa_jax import SharingPlan
    from sa_jax.analysis.refit import refit
    from sa_jax.cli.progress import stages
    from sa_jax.cli.texts import rows_of_texts
    from sa_jax.formats.hf_plan import check_can_narrow

    check_absent(self.out)
    check_writable(self.json)
    self.opening.begin()
    config = self.opening.config(self.model)
    plan = SharingPlan.parse(self.plan, config.num_layers)
    self.how.check(config)
    if self.how.value_dim is not None:
      check_can_narrow(config)
    if not plan.followers and self.how.value_dim is None:
      raise UserError(f"the plan {self.plan!r} has no followers to refit")
    tokenizer = self.opening.tokenizer(self.model)
    tokens = np.concatenate(rows_of_texts(tokenizer, self.texts, self.cutting, self.rows))
    model, params = self.opening.open_dense(self.model, self.dtype)
    with stages() as stage:
      made = refit(model, params, plan, tokens, self.how, progress=stage("refitting"))
    show_table(
      f"squared error relative to the target, {self.cutting.describe(tokenizer, len(tokens))}",
      ["layer", "part", "before", "after"],
      [[str(each.layer), each.part, f"{each.before:.4f}", f"{each.after:.4f}"] for each in made.reports],
    )
    self.opening.save(self.out, self.model, made.model, made.params, self.dtype)
    tell("saved", self.out)
    write_json(self.json, [each._asdict() for each in made.reports])
