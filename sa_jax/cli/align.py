"""``sa-jax align``: choose which anchor head each follower head uses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sa_jax.cli.common import exact_float32, show_table, tell, write_json
from sa_jax.cli.flags import at_least_one
from sa_jax.cli.opening import Opening
from sa_jax.cli.texts import RowLength
from sa_jax.config import FloatDtype
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_absent, check_writable
from sa_jax.plan import SharingPlan


@dataclasses.dataclass(frozen=True)
class Align:
  """Choose a head map for every follower of a plan; on the calibration text it is never worse than no map."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A dense model: a Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id."""
  plan: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PLAN")]
  """Which layers share, such as 22:23-26."""
  texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], at_least_one("TEXT")]
  """Text files (or .jsonl with a "text" per line) to calibrate on."""
  kinds: tuple[Literal["group", "permutation", "free"], ...] = ("group", "permutation", "free")
  """Kinds of maps to consider; only group costs nothing at run time, because it is folded into the weights."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  cutting: Annotated[RowLength, tyro.conf.arg(name="row")] = dataclasses.field(default_factory=RowLength)
  """How to cut rows from texts."""
  rows: Count = 4
  """Rows of each text."""
  out: Path | None = None
  """Save the shared model to this checkpoint, which must not exist."""
  dtype: FloatDtype = "bfloat16"
  """Type of the stored parameters."""
  json: Path | None = None
  """Also write the maps to this file."""

  exact: ClassVar[bool] = True

  def __post_init__(self) -> None:
    check_fields(self, "align")

  @exact_float32()
  def run(self) -> None:
    """Prints each follower's map and the improvement."""
    import numpy as np

    from sa_jax.analysis.align import align, shared_model
    from sa_jax.cli.progress import stages
    from sa_jax.cli.texts import rows_of_texts
    from sa_jax.formats.hf_plan import write_plan

    check_absent(self.out)
    check_writable(self.json)
    self.opening.begin()
    plan = SharingPlan.parse(self.plan, self.opening.config(self.model).num_layers)
    if not plan.followers:
      raise UserError(f"the plan {self.plan!r} has no followers to align")
    tokenizer = self.opening.tokenizer(self.model)
    tokens = np.concatenate(rows_of_texts(tokenizer, self.texts, self.cutting, self.rows))
    model, params = self.opening.open_dense(self.model, self.dtype)
    with stages() as stage:
      result = align(model, params, plan, tokens, kinds=self.kinds, progress=stage("aligning heads"))
    show_table(
      "head maps: for each head of a follower, the head of its anchor whose attention weights it uses",
      ["follower", "anchor", "anchor's head, for heads 0, 1, …"],
      [[str(layer), str(plan.source[layer]), _heads(result.plan, layer)] for layer in plan.followers],
    )
    losses = f"{math.exp(result.identity_loss):.3f} without maps, {math.exp(result.loss):.3f} with them"
    tell(f"perplexity on {self.cutting.describe(tokenizer, len(tokens))}", losses)
    if self.out is not None:
      self.opening.save(self.out, self.model, *shared_model(model.config, params, result.plan), self.dtype)
    write_json(
      self.json,
      {"shared_attention": write_plan(result.plan), "loss": result.loss, "identity_loss": result.identity_loss},
    )


def _heads(plan: SharingPlan, layer: int) -> str:
  heads = plan.head_map_of(layer)
  return "the same (no map)" if heads is None else " ".join(map(str, heads))
