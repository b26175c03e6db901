"""Time to trace, lower and compile programs of Llama-3-8B on this machine, without running or allocating them.

python compilation.py --json cpu/compilation.json
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from pathlib import Path

import jax

from sa_jax import ModelConfig, SharingPlan
from sa_jax.cli.common import show_table
from sa_jax.fit import Job, executables_of
from sa_jax.mesh import MeshSizes

KINDS = {"train": (1, 4096, "float32"), "loop": (16, 4096, "bfloat16"), "calibration": (4, 512, "bfloat16")}
"""By kind (see `sa_jax.fit.Job`): rows, tokens per row, and the parameters' dtype. Calibration is the program that
`share` uses to refit a plan."""

EVENTS = {
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}


def measure(kind: str, model: str, plan: str, layers: int | None) -> dict[str, float | str]:
  """Seconds per kind for Python and tracing, lowering, and compiling, over all programs."""
  rows, length, stored = KINDS[kind]
  config = ModelConfig.preset(model)
  config = dataclasses.replace(
    config, num_layers=layers or config.num_layers, param_dtype=stored, dtype="bfloat16", eos_token_ids=()
  )
  job = Job(config, SharingPlan.parse(plan, config.num_layers), kind, ":1", rows, length, MeshSizes(data=1))
  seconds: collections.Counter[str] = collections.Counter()
  count: collections.Counter[str] = collections.Counter()

  def listen(event: str, duration: float, **_: object) -> None:
    if event in EVENTS:
      seconds[EVENTS[event]] += duration
      count[EVENTS[event]] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  start = time.perf_counter()
  executables_of(job, job.mesh.mesh(jax.devices()[:1]))
  whole = time.perf_counter() - start
  jax.monitoring.clear_event_listeners()
  return {
    "kind": kind,
    "plan": plan,
    "programs": count["compile"],
    "trace": whole - seconds.total(),
    "lower": seconds["lower"],
    "compile": seconds["compile"],
  }


def main() -> None:
  """Measures each kind under a plan, and dense where possible."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", default="llama-3-8b")
  parser.add_argument("--plan", nargs="+", default=["dense", "15:16-30"])
  parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
  parser.add_argument("--layers", type=int)
  parser.add_argument("--json", type=Path)
  given = parser.parse_args()
  found = []
  for kind in given.kinds:
    for plan in given.plan:
      if kind != "calibration" or plan != "dense":
        found.append(measure(kind, given.model, plan, given.layers))
  rows = [[str(v) if not isinstance(v, float) else f"{v:.1f}" for v in each.values()] for each in found]
  device = jax.devices()[0].device_kind
  show_table(f"seconds to compile {given.model}, {device}, jax {jax.__version__}", list(found[0]), rows)
  if given.json:
    about = {"device": device, "jax": jax.__version__, "model": given.model, "layers": given.layers}
    given.json.write_text(json.dumps(about | {"programs": found}, indent=1) + "\n")


if __name__ == "__main__":
  main()
