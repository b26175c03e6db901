"""``sa-jax bench``: speed compared with dense models and other libraries."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.bench.task import Kind, Peer, Result, Setting, Task, run_task
from sa_jax.cli.common import console, plans_asked, show_table, write_json
from sa_jax.cli.progress import progress
from sa_jax.config import AttentionState
from sa_jax.display import quantity
from sa_jax.errors import UserError
from sa_jax.files import check_writable
from sa_jax.plan import as_plan

_UNITS = {"decode": "B/s", "prefill": "FLOP/s", "train": "FLOP/s", "step": "FLOP/s", "batching": "tokens/s"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Setting):
  """Time decoding, prefill, gradients, train steps or continuous batching, with random weights in a model's shapes."""

  task: tyro.conf.Positional[Kind]
  """decode: one token per row; prefill, train: forward pass and gradient of a stack of layers; step: a whole train step
  of the whole model; batching: requests of different lengths."""
  model: str = "llama-3-8b"
  """A preset: gpt-oss-20b, llama-2-7b, llama-2-13b, llama-3-8b, mixtral-8x7b or smollm2-135m."""
  plan: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLAN ...")] = ("dense",)
  """One or more plans; None for dense."""
  length: tuple[int, ...] = (1024,)
  """Tokens per row, one or more; for decode and batching, cache slots."""
  attention_state: tuple[AttentionState, ...] = ("query_key",)
  """prefill, train and step: what anchors pass to followers."""
  attention: tuple[str, ...] = ("auto",)
  """prefill, train and step: attention backends: auto, cudnn, flash, splash, blockwise, reference, chunked."""
  peers: tuple[Peer, ...] = ()
  """Also time transformers (PyTorch, dense) in the same run."""
  plot: Path | None = None
  """decode: plot time and cache size against length to this PNG."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def run(self) -> None:
    """Measures each combination in a separate process, and prints a table."""
    tasks = self._tasks()
    if self.plot is not None and self.task != "decode":
      raise UserError(f"`plot` works only with decode, not with {self.task}; leave it out")
    if self.plot is not None and self.filled is not None:
      raise UserError("`plot` needs full caches: leave out `filled`")
    if self.plot is not None:
      from sa_jax.analysis import plots

      plots.check_installed()
    for file in (self.plot, self.json):
      check_writable(file)
    results: list[Result] = []
    try:
      with progress(f"measuring {self.task}") as report:
        for index, task in enumerate(tasks):
          results.append(run_task(task))
          report(index + 1, len(tasks))
    finally:  # report completed measurements even after an error
      if results:
        self._tell(results)
    if self.plot is not None:
      from sa_jax.bench.plot import decode_curves

      decode_curves(results, self.plot)
      console.print(f"plot: {self.plot}")

  def _tell(self, results: list[Result]) -> None:
    columns = ["", "B", "S", "ms", "low to high", "work", "rate", "of ceiling", "temporaries", "detail"]
    show_table(f"{self.task}, {self.model}, {results[0].device}", columns, [_row(result) for result in results])
    if ceilings := [result.ceiling for result in results if result.ceiling]:
      what = "copy bandwidth" if self.task == "decode" else "matrix product"
      low, high = quantity(min(ceilings), _UNITS[self.task]), quantity(max(ceilings), _UNITS[self.task])
      together = "" if results[0].task.mesh.size == 1 else ", all devices at once"
      console.print(f"ceiling: {what} measured in each process{together}, {low} to {high}")
    write_json(self.json, results)

  def _tasks(self) -> list[Task]:
    setting = {field.name: getattr(self, field.name) for field in dataclasses.fields(Setting)}
    base = Task(self.task, self.model, length=max(self.length), **setting)
    plans = [str(as_plan(plan, base.config.num_layers)) for plan in plans_asked(self.plan)]
    tasks = [
      dataclasses.replace(base, plan=plan, length=length, attention_state=state, attention=attention)
      for length, state, attention, plan in itertools.product(self.length, self.attention_state, self.attention, plans)
    ]
    if self.peers and self.task == "batching":
      raise UserError("`peers` works with decode, prefill, train and step, not with batching")
    tasks += [
      dataclasses.replace(base, length=length, who=who) for who, length in itertools.product(self.peers, self.length)
    ]
    return tasks


def _row(result: Result) -> list[str]:
  task = result.task
  name = task.plan if task.who == "sa_jax" else task.who
  if task.attention_state != "query_key":
    name += f" {task.attention_state}"
  if task.group_backward and task.who == "sa_jax" and task.plan != "dense":
    name += ", one backward pass per group"
  work = {"decode": "B", "batching": "tokens"}.get(task.kind, "FLOP")
  return [
    name,
    str(task.batch_size),
    str(task.length) if task.filled is None else f"{task.filled} of {task.length}",
    f"{result.seconds * 1e3:.2f}",
    f"{result.low * 1e3:.2f}–{result.high * 1e3:.2f}",
    quantity(result.work, work),
    quantity(result.rate, _UNITS[task.kind]),
    "" if result.share is None else f"{100 * result.share:.1f} %",
    "" if result.temp_bytes is None else quantity(result.temp_bytes, "B"),
    result.detail,
  ]
