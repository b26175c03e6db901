"""The process that `run_task` starts: ``python -m sa_jax.bench.worker TASK_AS_JSON`` prints the result as JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys

from sa_jax.bench.task import task_of


def main(text: str) -> None:
  """Measures one task."""
  task = task_of(json.loads(text))
  # Other libraries share the device: allocate memory on demand, to leave them theirs.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  whose = importlib.import_module("sa_jax.bench." + ("ours" if task.who == "sa_jax" else "peers"))
  try:
    result = getattr(whose, task.kind)(task)
  except ValueError as error:
    if os.environ.get("SA_JAX_DEBUG"):
      raise
    sys.exit(str(error))
  print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
  main(sys.argv[1])
