"""One measurement, run in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any, Literal

from sa_jax.config import AttentionBackend, AttentionState, CacheDtype, RematPolicy

Kind = Literal["decode", "prefill", "train", "step", "batching"]
Who = Literal["sa_jax", "hf-compiled", "hf-eager"]


@dataclasses.dataclass(frozen=True)
class Task:
  """What to measure.

  Attributes:
    kind: ``decode``, one token a row; ``prefill``, a forward pass of a stack of layers; ``train``, its gradient;
      ``step``, a whole train step of the whole model, AdamW on float32 parameters; ``batching``, many requests of
      unequal length.
    model: a preset.
    plan: a plan string.
    batch: rows, or slots.
    seq_len: tokens a row: cache slots in decode.
    layers: depth; the preset's when None.
    who: whose code: ours, or transformers' on torch, compiled or not.
    attention_state: as in `ModelConfig`.
    attention: as in `ModelConfig`.
    remat: step: as in `ModelConfig`; of peers, gradient checkpointing unless ``none``.
    cache_dtype: as in `ModelConfig`.
    requests: batching: how many.
    repeats: timed calls.
  """

  kind: Kind
  model: str
  plan: str = "dense"
  batch: int = 1
  seq_len: int = 1024
  layers: int | None = None
  who: Who = "sa_jax"
  attention_state: AttentionState = "query_key"
  attention: AttentionBackend = "auto"
  remat: RematPolicy = "full"
  cache_dtype: CacheDtype = None
  requests: int = 256
  repeats: int = 10


@dataclasses.dataclass(frozen=True)
class Result:
  """What was measured.

  Attributes:
    task: what.
    seconds: median of a decode step, a forward pass, a gradient, a train step, or the whole of the requests.
    low: fastest.
    high: slowest.
    work: bytes that must move (decode), FLOPs without those of recomputation (prefill, train, step), or tokens
      (batching).
    ceiling: bytes or FLOPs a second that the device reached in the same process, on a copy or a matrix product; 0 where
      there is none.
    temp_bytes: temporaries of the compiled program, where it is known.
    device: the card.
    detail: anything else, such as the attention backend.
  """

  task: Task
  seconds: float
  low: float
  high: float
  work: float
  ceiling: float
  device: str
  temp_bytes: int | None = None
  detail: str = ""

  @property
  def rate(self) -> float:
    """Work a second."""
    return self.work / self.seconds

  @property
  def share(self) -> float | None:
    """The part of the ceiling that was reached."""
    return self.rate / self.ceiling if self.ceiling else None


def run_task(task: Task) -> Result:
  """Measures in a new process.

  Raises:
    ValueError: if the measurement failed; the end of its output says why.
  """
  command = [sys.executable, "-m", "sa_jax.bench.worker", json.dumps(dataclasses.asdict(task))]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    raise ValueError(f"{task} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
  values: dict[str, Any] = json.loads(lines[-1])
  return Result(**values | {"task": Task(**values["task"])})
