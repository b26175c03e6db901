"""Plots of measurements, as PNG. Needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sa_jax.analysis.plots import new_figure, save
from sa_jax.bench.task import Result
from sa_jax.costs import cost
from sa_jax.errors import UserError


def decode_curves(results: Sequence[Result], path: Path) -> None:
  """Plots decode time and cache size against context length, one line per plan.

  Args:
    results: decode measurements; other libraries' are left out.
    path: the PNG to write.

  Raises:
    UserError: if matplotlib is not installed, or a measurement is not of decoding.
  """
  if others := {result.task.kind for result in results} - {"decode"}:
    raise UserError(f"these curves need decode results, not {', '.join(sorted(others))}")
  results = [result for result in results if result.task.who == "sa_jax"]
  figure = new_figure(10, 4)
  time_axes, cache_axes = figure.subplots(1, 2)
  for plan in dict.fromkeys(result.task.plan for result in results):
    chosen = [result for result in results if result.task.plan == plan]
    lengths = [result.task.length for result in chosen]
    cache = [cost(r.task.config, plan, r.task.batch_size, r.task.length).kv_cache_bytes for r in chosen]
    time_axes.plot(lengths, [result.seconds * 1e3 for result in chosen], marker="o", label=plan)
    cache_axes.plot(lengths, [size / 1e9 for size in cache], marker="o", label=plan)
  task, device = results[0].task, results[0].device
  batch, title = task.batch_size, f"{task.model}, a decode step of {task.batch_size} rows, {device}"
  time_axes.set(title=title, xlabel="context, tokens", ylabel="ms", ylim=(0, None))
  cache_axes.set(title=f"KV cache of {batch} rows", xlabel="context, tokens", ylabel="GB", ylim=(0, None))
  for axes in (time_axes, cache_axes):
    axes.legend()
    axes.grid(alpha=0.3)
  save(figure, path)
