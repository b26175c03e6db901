"""The timeline of one decode step, ours and transformers', kernel by kernel.

python timeline.py measure --who sa_jax --out ours.json; python timeline.py draw ours.json hf.json --out timeline.png
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sa_jax import bench
from sa_jax.bench import Task, Timing
from sa_jax.bench.task import STEPS

PART = 0.01
"""Kernels with a smaller fraction of a step are drawn in one colour without names."""


class Kernel(NamedTuple):
  """Attributes:
  name: the kernel's name.
  start: in microseconds.
  length: in microseconds.
  """

  name: str
  start: float
  length: float


def of_jax(folder: Path) -> list[Kernel]:
  """The kernels in a trace from `jax.profiler`, in order of their start."""
  import jax

  (path,) = folder.rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  lines = [line for plane in planes if "GPU:0" in plane.name for line in plane.lines if "Stream" in line.name]
  events = [Kernel(each.name, each.start_ns / 1e3, each.duration_ns / 1e3) for line in lines for each in line.events]
  return sorted(events, key=lambda kernel: kernel.start)


def of_torch(path: Path) -> list[Kernel]:
  """The kernels in a trace from `torch.profiler`, in order of their start."""
  events = json.loads(path.read_text())["traceEvents"]
  on_card = ("kernel", "gpu_memcpy", "gpu_memset")
  kernels = [Kernel(each["name"], each["ts"], each["dur"]) for each in events if each.get("cat") in on_card]
  return sorted(kernels, key=lambda kernel: kernel.start)


def one_of(kernels: list[Kernel], steps: int) -> list[Kernel]:
  """The kernels of one step in the middle: between two occurrences of a kernel that runs once per step."""
  counts = collections.Counter(kernel.name for kernel in kernels)
  marks = [name for name, count in counts.items() if count == steps]
  if not marks:
    raise SystemExit(f"no kernel runs {steps} times, once a step")
  starts = [kernel.start for kernel in kernels if kernel.name == marks[0]]
  begin, end = starts[steps // 2], starts[steps // 2 + 1]
  return [kernel._replace(start=kernel.start - begin) for kernel in kernels if begin <= kernel.start < end]


def measure(task: Task, out: Path) -> None:
  """Records one decode step, and its time without a profiler."""
  found: list[Kernel] = []

  def timed(call: Callable[[], Any], repeats: int) -> Timing:
    import jax

    wait = jax.block_until_ready if task.who == "sa_jax" else _synchronised
    timing = bench.timed(call, repeats, warmup=3, wait=wait)
    with tempfile.TemporaryDirectory() as folder:
      found.extend(one_of((_by_jax if task.who == "sa_jax" else _by_torch)(call, Path(folder)), STEPS))
    return timing

  if task.who == "sa_jax":
    from sa_jax.bench import ours

    ours.timed = timed
    result = ours.decode(task)
  else:
    from sa_jax.bench import peers

    peers._timed = timed
    result = peers.decode(task)
  name = f"sa_jax, {task.plan}" if task.who == "sa_jax" else f"transformers, {task.who.removeprefix('hf-')}"
  what = f"{task.model}, {task.batch_size} rows of {task.length} tokens"
  values = {"who": name, "what": what, "device": result.device, "milliseconds": result.seconds * 1e3, "kernels": found}
  out.write_text(json.dumps(values))


def _synchronised(_: Any) -> None:
  import torch

  torch.cuda.synchronize()


def _by_jax(call: Callable[[], Any], folder: Path) -> list[Kernel]:
  import jax

  with jax.profiler.trace(str(folder)):
    jax.block_until_ready(call())
  return of_jax(folder)


def _by_torch(call: Callable[[], Any], folder: Path) -> list[Kernel]:
  import torch

  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
    call()
    torch.cuda.synchronize()
  profile.export_chrome_trace(str(folder / "trace.json"))
  return of_torch(folder / "trace.json")


def totals(kernels: Iterable[Kernel]) -> dict[str, tuple[int, float]]:
  """Per kernel name, the number of runs and total microseconds, longest first."""
  found: dict[str, tuple[int, float]] = {}
  for kernel in kernels:
    count, length = found.get(kernel.name, (0, 0.0))
    found[kernel.name] = count + 1, length + kernel.length
  return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def draw(files: list[Path], out: Path) -> None:
  """One figure: each file's step as a timeline, with every kernel above `PART` of the step listed below."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  steps = [json.loads(path.read_text()) for path in files]
  figure, axes = pyplot.subplots(
    2 * len(steps), 1, figsize=(13, 5 * len(steps)), height_ratios=(1, 3) * len(steps), layout="constrained"
  )
  longest = max(each["start"] for step in steps for each in map(_as_dict, step["kernels"]))
  for step, line, bars in zip(steps, axes[::2], axes[1::2], strict=True):
    kernels = [Kernel(*each) for each in step["kernels"]]
    whole = sum(kernel.length for kernel in kernels)
    large = {name: each for name, each in totals(kernels).items() if each[1] > PART * whole}
    colours = {name: f"C{index % 10}" for index, name in enumerate(large)}
    for name in [*large, None]:
      mine = [kernel for kernel in kernels if (kernel.name == name if name else kernel.name not in large)]
      line.broken_barh([(each.start, each.length) for each in mine], (0, 1), color=colours.get(name, "0.7"))
    title = f"{step['who']}: {step['milliseconds']:.2f} ms a step, {len(kernels)} kernels, {whole / 1e3:.2f} ms of them"
    line.set(title=title, xlabel="µs", xlim=(0, longest * 1.02), yticks=[])
    labels = [f"{count} × {name[:48]}" for name, (count, _) in large.items()]
    bars.barh(labels, [length / 1e3 for _, length in large.values()], color=list(colours.values()))
    bars.invert_yaxis()
    bars.set(xlabel="ms a step", title=f"kernels over {PART:.0%}")
    bars.tick_params(axis="y", labelsize=7)
  figure.suptitle(f"One decode step of {steps[0]['what']}, {steps[0]['device']}")
  figure.savefig(out, dpi=120)


def _as_dict(kernel: list[Any]) -> dict[str, Any]:
  return Kernel(*kernel)._asdict()


def main() -> None:
  """Records a step, or draws recorded ones."""
  parser = argparse.ArgumentParser(description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True)
  measuring = commands.add_parser("measure")
  measuring.add_argument("--who", default="sa_jax", choices=["sa_jax", "hf-compiled", "hf-eager"])
  measuring.add_argument("--model", default="llama-2-7b")
  measuring.add_argument("--layers", type=int)
  measuring.add_argument("--batch-size", type=int, default=8)
  measuring.add_argument("--length", type=int, default=2048)
  measuring.add_argument("--plan", default="dense")
  measuring.add_argument("--out", type=Path, required=True)
  drawing = commands.add_parser("draw")
  drawing.add_argument("files", type=Path, nargs="+")
  drawing.add_argument("--out", type=Path, required=True)
  given = vars(parser.parse_args())
  if given.pop("command") == "draw":
    draw(given["files"], given["out"])
  else:
    out = given.pop("out")
    measure(Task("decode", **given, repeats=5), out)


if __name__ == "__main__":
  main()
