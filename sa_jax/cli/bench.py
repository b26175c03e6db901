"""``sa-jax bench``: how fast, beside dense and beside peers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sa_jax.bench.task import Kind, Result, Task, run_task
from sa_jax.cli.common import console, progress, quantity, show_table, write_json
from sa_jax.config import RematPolicy
from sa_jax.errors import UserError
from sa_jax.files import check_writable
from sa_jax.plan import as_plan

_UNITS = {"decode": "B/s", "prefill": "FLOP/s", "train": "FLOP/s", "step": "FLOP/s", "batching": "tokens/s"}


@dataclasses.dataclass(frozen=True)
class Bench:
  """Time decoding, prefill, gradients, train steps or continuous batching in a model's shapes (random weights)."""

  task: tyro.conf.Positional[Kind]
  """decode: one token a row; prefill, train: a stack of layers, forward and gradient; step: a whole train step of the
  whole model; batching: unequal requests."""
  model: str = "llama-3-8b"
  """A preset: llama-2-7b, llama-2-13b, llama-3-8b or smollm2-135m."""
  plan: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLAN ...")] = ("dense",)
  """One or more plans."""
  batch_size: int = 1
  """Rows; in batching, slots."""
  length: tuple[int, ...] = (1024,)
  """Tokens a row, one or more; in decode and batching, cache slots."""
  filled: int | None = None
  """decode: how many of the slots have tokens at the end; all when None."""
  layers: int | None = None
  """Depth; the preset's when None."""
  attention_state: tuple[Literal["query_key", "attention_weights"], ...] = ("query_key",)
  """What followers get from their anchor, in prefill, train and step."""
  attention: tuple[Literal["auto", "reference", "blockwise", "cudnn", "flash", "splash"], ...] = ("auto",)
  """Attention backends, in prefill, train and step."""
  remat: RematPolicy = "full"
  """step: what the backward pass computes again; peers checkpoint gradients unless it is none."""
  cache_dtype: Literal["int8"] | None = None
  """int8 instead of bfloat16, in decode and batching."""
  peers: tuple[Literal["hf-compiled", "hf-eager"], ...] = ()
  """Also time transformers on torch, dense, in the same run."""
  requests: int = 256
  """How many, in batching."""
  repeats: int = 10
  """Timed calls of each."""
  data: int = 1
  """step: devices over which rows are split, parameters being copied. The first devices are used, as many as needed."""
  fsdp: int = 1
  """step: devices over which rows and parameters are split."""
  tensor: int = 1
  """step and decode: devices over which heads, MLP and vocabulary are split."""
  sequence: int = 1
  """step: devices over which the tokens of a row are split."""
  plot: Path | None = None
  """decode: draw time and cache size against the length to this PNG."""
  json: Path | None = None
  """Also write the numbers to this file."""

  def run(self) -> None:
    """Measures each combination in a process of its own, and prints a table."""
    tasks = self._tasks()
    if self.plot is not None and (self.filled is not None or self.task != "decode"):
      raise UserError("`plot` draws decode against `length`, of caches that are full: leave out `filled`")
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
    finally:  # what has been measured is told, whatever comes after it
      if results:
        self._tell(results)
    if self.plot is not None:
      from sa_jax.bench.plot import decode_curves

      decode_curves(results, self.plot)
      console.print(f"drawn: {self.plot}")

  def _tell(self, results: list[Result]) -> None:
    columns = ["", "B", "S", "ms", "low to high", "work", "rate", "of ceiling", "temporaries", "detail"]
    show_table(f"{self.task}, {self.model}, {results[0].device}", columns, [_row(result) for result in results])
    if ceilings := [result.ceiling for result in results if result.ceiling]:
      what = "copy bandwidth" if self.task == "decode" else "matrix product"
      low, high = quantity(min(ceilings), _UNITS[self.task]), quantity(max(ceilings), _UNITS[self.task])
      together = "" if math.prod(results[0].task.mesh.values()) == 1 else ", all devices at once"
      console.print(f"ceiling: {what} measured in each process{together}, {low} to {high}")
    write_json(self.json, results)

  def _tasks(self) -> list[Task]:
    base = Task(
      self.task,
      self.model,
      batch=self.batch_size,
      seq_len=max(self.length),
      filled=self.filled,
      layers=self.layers,
      remat=self.remat,
      cache_dtype=self.cache_dtype,
      requests=self.requests,
      repeats=self.repeats,
      data=self.data,
      fsdp=self.fsdp,
      tensor=self.tensor,
      sequence=self.sequence,
    )
    plans = [str(as_plan(plan, base.config.num_layers)) for plan in self.plan]
    tasks = [
      dataclasses.replace(base, plan=plan, seq_len=length, attention_state=state, attention=attention)
      for length, state, attention, plan in itertools.product(self.length, self.attention_state, self.attention, plans)
    ]
    if self.peers and self.task not in ("decode", "train", "step"):
      raise UserError(f"peers are timed in decode, train and step, not in {self.task}")
    tasks += [
      dataclasses.replace(base, seq_len=length, who=who) for who, length in itertools.product(self.peers, self.length)
    ]
    return tasks


def _row(result: Result) -> list[str]:
  task = result.task
  name = task.plan if task.who == "sa_jax" else task.who
  if task.attention_state != "query_key":
    name += f" {task.attention_state}"
  work = {"decode": "B", "batching": "tokens"}.get(task.kind, "FLOP")
  return [
    name,
    str(task.batch),
    str(task.seq_len) if task.filled is None else f"{task.filled} of {task.seq_len}",
    f"{result.seconds * 1e3:.2f}",
    f"{result.low * 1e3:.2f}–{result.high * 1e3:.2f}",
    quantity(result.work, work),
    quantity(result.rate, _UNITS[task.kind]),
    "" if result.share is None else f"{100 * result.share:.1f} %",
    "" if result.temp_bytes is None else quantity(result.temp_bytes, "B"),
    result.detail,
  ]
