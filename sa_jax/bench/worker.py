"""The process that `run_task` starts: ``python -m sa_jax.bench.worker TASK_AS_JSON`` prints the result as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from sa_jax.bench.task import Task


def main(text: str) -> None:
  """Measures one task."""
  task = Task(**json.loads(text))
  # Peers share the card; taking memory as it is needed leaves them theirs.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if task.who == "sa_jax":
    from sa_jax.bench import ours

    result = getattr(ours, task.kind)(task)
  else:
    from sa_jax.bench import peers

    result = getattr(peers, task.kind)(task)
  print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
  main(sys.argv[1])
