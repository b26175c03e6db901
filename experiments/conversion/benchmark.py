"""Peak memory and time to open and convert a checkpoint; README.md has the commands and expected results.

Each measurement runs in a separate process, whose peak resident memory the kernel reports at exit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_START = "import jax, orbax.checkpoint, sa_jax; jax.devices(); "
_OPEN = "jax.block_until_ready(sa_jax.from_pretrained(sys.argv[{}], layout='{}'))"
_TASKS = {
  "start": "pass",
  "convert": "sa_jax.convert(sys.argv[2], sys.argv[3])",
  "open safetensors, runs": _OPEN.format(2, "runs"),
  "open ours, runs": _OPEN.format(3, "runs"),
  "open safetensors, layers": _OPEN.format(2, "layers"),
  "open ours, layers": _OPEN.format(3, "layers"),
  "copy": "copy(sys.argv[2], sys.argv[4])",
}
_SLOWER = 1.5  # maximum time to open our checkpoint, relative to safetensors


def peak_bytes() -> int:
  """Peak resident memory of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(task: str, src: Path, scratch: Path, times: int) -> dict[str, float]:
  """Runs one task in fresh processes; returns the fastest."""
  found = []
  for _ in range(times):
    if task in ("convert", "copy"):
      shutil.rmtree(scratch / task, ignore_errors=True)
    done = subprocess.run(
      [sys.executable, __file__, "--task", task, str(src), str(scratch / "convert"), str(scratch / "copy")],
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found.append(json.loads(done.stdout.splitlines()[-1]))
  return min(found, key=lambda result: result["seconds"])


def copy(src: str, dst: str) -> None:
  """Copies a folder and waits until it is on disk (fsync of each file), as conversion does: not in the page cache."""
  shutil.copytree(src, dst)
  for file in Path(dst).iterdir():
    with file.open("rb") as opened:
      os.fsync(opened.fileno())


def run_task(task: str) -> None:
  """Runs in such a process: prints seconds and bytes."""
  scope = {"sys": sys, "copy": copy}
  sys.argv = [sys.argv[0], task, *sys.argv[3:]]
  exec(_START, scope)
  began = time.perf_counter()
  exec(_TASKS[task], scope)
  seconds = time.perf_counter() - began
  used = resource.getrusage(resource.RUSAGE_SELF)
  print(json.dumps({"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": peak_bytes()}))


def main() -> None:
  """Measures, prints the table, and fails if a limit is exceeded."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint; a synthetic one is made when left out")
  parser.add_argument("--times", type=int, default=3, help="processes a measurement; the fastest counts")
  parser.add_argument("--json", type=Path)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=arguments.folder.parent if arguments.folder else None) as scratch:
    folder = arguments.folder
    if folder is None:
      folder = Path(scratch) / "model"
      # In a separate process: a child's peak includes its parent's memory at the fork.
      subprocess.run([sys.executable, Path(__file__).with_name("make_checkpoint.py"), folder], check=True)
    from sa_jax.formats.source import open_source

    sizes = [2 * count for count in map(_count, open_source(folder).shapes.values())]
    stored, largest = sum(sizes), max(sizes)
    measure("copy", folder, Path(scratch), 1)  # warms the page cache for all later measurements
    found = {task: measure(task, folder, Path(scratch), arguments.times) for task in _TASKS}
  start = found["start"]["peak"]
  opening = 1.15 * stored + 0.6e9
  limits = {task: opening for task in found if task.startswith("open")} | {"convert": start + 1.0e9 + largest}
  print(f"{stored / 1e9:.2f} GB of bfloat16, largest tensor {largest / 1e9:.2f} GB, start {start / 1e9:.2f} GB")
  print(f"{'':<24} {'seconds':>8} {'× copy':>7} {'CPU s':>6} {'peak GB':>8} {'limit GB':>9}")
  for task, result in found.items():
    limit = f"{limits[task] / 1e9:9.2f}" if task in limits else ""
    ratio = result["seconds"] / found["copy"]["seconds"]
    print(f"{task:<24} {result['seconds']:8.2f} {ratio:7.2f} {result['cpu']:6.1f} {result['peak'] / 1e9:8.2f} {limit}")
  if arguments.json:
    arguments.json.write_text(json.dumps({"stored": stored, "largest": largest, "limits": limits, **found}, indent=2))
  if over := [task for task, limit in limits.items() if found[task]["peak"] > limit]:
    sys.exit(f"over the limit: {', '.join(over)}")
  for layout in ("runs", "layers"):
    theirs, ours = (found[f"open {whose}, {layout}"]["seconds"] for whose in ("safetensors", "ours"))
    if ours > _SLOWER * theirs:
      sys.exit(f"opening ours, in {layout}, takes {ours / theirs:.2f} times what opening safetensors takes")


def _count(shape: tuple[int, ...]) -> int:
  count = 1
  for size in shape:
    count *= size
  return count


if __name__ == "__main__":
  if "--task" in sys.argv:
    run_task(sys.argv[2])
  else:
    main()
