"""``sa-jax refit``: recover what a plan costs, in closed form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sa_jax.cli.common import console, exact_float32, show_table, write_json
from sa_jax.cli.texts import RowLength
from sa_jax.files import check_absent, check_writable


@dataclasses.dataclass(frozen=True)
class RefitModel:
  """Refit a plan's followers to the dense model on calibration text, without training; save an ordinary checkpoint."""

  model: tyro.conf.Positional[Path]
  """A dense Hugging Face folder, GGUF file or sa_jax checkpoint."""
  plan: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PLAN")]
  """Which layers share, such as 22:23-26."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT ...")]
  """Text files (or .jsonl with a "text" a line) to calibrate on."""
  out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
  """The checkpoint to write, which must not exist."""
  maps: bool = True
  """Whether to choose head maps by the error that the refit leaves."""
  mlp: bool = False
  """Whether to refit the last projection of MLPs too; needs much text."""
  values: int = 0
  """Conjugate-gradient steps on each follower's W_V."""
  ridge: float = 0.01
  """How strongly W_O is held to the old weights, relative to its inputs' energy."""
  mlp_ridge: float = 0.3
  """The same for MLPs."""
  cutting: RowLength = dataclasses.field(default_factory=RowLength)
  """Rows."""
  rows: int = 16
  """Rows of each text."""
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
  """Type of the stored parameters."""
  json: Path | None = None
  """Also write the errors to this file."""

  exact: ClassVar[bool] = True

  @exact_float32()
  def run(self) -> None:
    """Prints the errors before and after, and saves."""
    import numpy as np

    from sa_jax import SharingPlan, load_tokenizer
    from sa_jax.analysis.refit import Refit, refit
    from sa_jax.cli.texts import open_dense, rows_of_texts, save, stages

    check_absent(self.out)
    check_writable(self.json)
    tokenizer = load_tokenizer(self.model)
    tokens = np.concatenate(rows_of_texts(tokenizer, self.texts, self.cutting, self.rows))
    model, params = open_dense(self.model)
    how = Refit(ridge=self.ridge, values=self.values, mlp=self.mlp, mlp_ridge=self.mlp_ridge, maps=self.maps)
    plan = SharingPlan.parse(self.plan, model.config.num_layers)
    with stages() as stage:
      made = refit(model, params, plan, tokens, how, progress=stage("refitting"))
    show_table(
      f"squared error relative to the target, {len(tokens)} {self.cutting.describe(tokenizer)}",
      ["layer", "part", "before", "after"],
      [[str(each.layer), each.part, f"{each.before:.4f}", f"{each.after:.4f}"] for each in made.reports],
    )
    save(self.out, self.model, made.model, made.params, self.dtype)
    console.print(f"saved: [bold]{self.out}[/bold]")
    write_json(self.json, [each._asdict() for each in made.reports])
