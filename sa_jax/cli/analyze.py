"""``sa-jax analyze``: which layers have similar attention."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from sa_jax.cli.common import console, exact_float32, is_first, show_table, tell, write_json
from sa_jax.cli.flags import at_least_one
from sa_jax.cli.opening import Opening
from sa_jax.cli.progress import progress
from sa_jax.cli.texts import RowLength
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_folder, check_writable, make_folder

_LEGEND = (
  "cosine, JS (Jensen-Shannon divergence) and top-{top_k} (shared fraction of the {top_k} keys with the largest "
  "weights) compare a layer's attention weights with the previous layer's: alike is 1, 0 and 1. Without sink: without "
  "the first key. Entropy is low and weighted variance high where a layer attends to few keys."
)


@dataclasses.dataclass(frozen=True)
class Analyze:
  """Measure attention similarity of all layer pairs and each layer's entropy; several checkpoints also show drift."""

  text: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEXT")]
  """A UTF-8 text file, or a .jsonl file with a "text" per line."""
  models: Annotated[tyro.conf.Positional[tuple[Path, ...]], at_least_one("MODEL")]
  """One or more checkpoints of the same model, in order."""
  opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening()
  """How to open the model."""
  cutting: Annotated[RowLength, tyro.conf.arg(name="row")] = dataclasses.field(default_factory=RowLength)
  """How to cut rows from texts."""
  rows: Count = 4
  """Rows of the text to read."""
  top_k: Count = 8
  """Number of keys with the largest weights to compare for the top-k overlap."""
  block: Count = 64
  """Queries per block; memory is layers × heads × block × length."""
  out: Path = Path("analysis")
  """Folder for the plots."""
  json: Path | None = None
  """Also write all numbers, per head and averaged, to this file."""

  exact: ClassVar[bool] = True

  def __post_init__(self) -> None:
    check_fields(self, "analyze")

  @exact_float32()
  def run(self) -> None:
    """Prints one row per layer and plots the maps."""
    from sa_jax.analysis import drift, layer_similarity, plots
    from sa_jax.cli.texts import rows_of_texts

    if not self.models:
      raise UserError("name at least one model: sa-jax analyze TEXT MODEL ...")
    if len(set(self.models)) < len(self.models):
      raise UserError("a model is listed twice; drift compares different checkpoints")
    plots.check_installed()
    check_folder(self.out)
    check_writable(self.json)
    self.opening.begin()
    found = {}
    for path in self.models:
      tokenizer = self.opening.tokenizer(path)
      (tokens,) = rows_of_texts(tokenizer, [self.text], self.cutting, self.rows)
      model, params = self.opening.open(path, dtype="float32")
      with progress(f"comparing layers, {path.name}") as report:
        found[str(path)] = layer_similarity(model, params, tokens, top_k=self.top_k, block=self.block, progress=report)
    name, similarity = list(found.items())[-1]
    mean = similarity.mean()
    show_table(
      f"{name}: each layer and the previous one, {self.cutting.describe(tokenizer, len(tokens))}",
      ["layer", "cosine", "without sink", "JS, nats", f"top-{self.top_k}", "entropy, nats", "weighted variance"],
      [[str(layer), *_beside(mean, layer)] for layer in range(len(mean.entropy))],
    )
    console.print(_LEGEND.format(top_k=self.top_k))
    if is_first():
      make_folder(self.out)
    rows_read = f"{self.text.name}, {self.cutting.describe(tokenizer, len(tokens))}"
    title = f"{Path(name).stem}\n{rows_read}"
    for field, scale in (
      ("cosine", plots.Scale("cosine similarity")),
      ("cosine_without_sink", plots.Scale("cosine similarity without the first key")),
      ("js_divergence", plots.Scale("Jensen-Shannon divergence, nats", math.log(2), distance=True)),
      ("top_k_overlap", plots.Scale(f"overlap of the top {self.top_k} keys")),
    ):
      file = self.out / f"{field}.png"
      if is_first():
        plots.similarity_map(getattr(mean, field), file, title=title, scale=scale)
      tell(scale.label, file)
    values: dict[str, Any] = {
      each: {"per_head": _lists(result), "mean": _lists(result.mean())} for each, result in found.items()
    }
    if len(found) > 1:
      distances = drift(list(found.values()))
      show_table("drift", ["checkpoint", "distance to the last"], [[n, f"{d:.4f}"] for n, d in zip(found, distances)])
      if is_first():
        plots.similarity_animation(
          {f"{each}\n{rows_read}": result.mean().cosine for each, result in found.items()},
          self.out / "drift.gif",
        )
      tell("over checkpoints", self.out / "drift.gif")
      values["drift"] = dict(zip(found, distances.tolist(), strict=True))
    write_json(self.json, values)


def _beside(mean: Any, layer: int) -> list[str]:
  """A layer's cells: compared with the previous layer, empty for the first, then its own."""
  pairs = [mean.cosine, mean.cosine_without_sink, mean.js_divergence, mean.top_k_overlap]
  beside = [f"{values[layer - 1, layer]:.3f}" if layer else "" for values in pairs]
  return [*beside, f"{mean.entropy[layer]:.3f}", f"{mean.weighted_variance[layer]:.3f}"]


def _lists(similarity: Any) -> dict[str, Any]:
  return {name: values.tolist() for name, values in similarity._asdict().items()}
