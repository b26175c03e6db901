"""One measurement, run in a separate process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal

from sa_jax.config import AttentionState, CacheDtype, Compute, ModelConfig, RematPolicy
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.mesh import MESH_AXES, MeshSizes

Kind = Literal["decode", "prefill", "train", "step", "batching"]
Peer = Literal["hf-compiled", "hf-eager"]
Who = Literal["sa_jax"] | Peer

STEPS = 32
"""Decode steps per timed call."""
PROMPT, LONGEST_ANSWER = 64, 512
"""Prompt tokens per request in batching, and the maximum number of new ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """Settings of a measurement."""

  batch_size: Count = 1
  """Rows per batch; for batching, slots."""
  filled: Count | None = None
  """decode: number of slots with tokens at the end; None for all."""
  layers: Count | None = None
  """Number of layers; None for the preset's."""
  remat: RematPolicy = "full"
  """step and train: what the backward pass recomputes; peers use full gradient checkpointing unless it is none."""
  group_backward: bool = False
  """step and train: whether a group's followers share one backward pass for q and k."""
  cache_dtype: CacheDtype = None
  """decode and batching: int8 or int4 instead of bfloat16."""
  value_dim: Count | None = None
  """Size of a head's values; None for that of its keys."""
  requests: Count = 256
  """batching: number of requests."""
  repeats: Count = 10
  """Timed calls per measurement."""
  mesh: MeshSizes = MeshSizes(data=1)
  """step: the device mesh, such as fsdp=2,tensor=2; decode: only tensor. Uses the first devices."""


@dataclasses.dataclass(frozen=True)
class Task(Setting):
  """What to measure.

  Attributes:
    kind: ``decode``, one token per row; ``prefill``, a forward pass of a stack of layers; ``train``, its gradient;
      ``step``, a train step of the whole model, AdamW on float32 parameters; ``batching``, many requests of different
      lengths.
    model: a preset.
    plan: a plan string.
    length: tokens per row; in decode, cache slots.
    who: the library: ours, or transformers on PyTorch, compiled or not.
    attention_state: as in `ModelConfig`.
    attention: as in `ModelConfig`.

  Raises:
    UserError: if the kind or the library does not support the mesh or a setting; if rows, tokens or requests do not
      divide; if more slots are filled than exist, or fewer than steps per call.
  """

  kind: Kind
  model: str
  plan: str = "dense"
  length: Count = 1024
  who: Who = "sa_jax"
  attention_state: AttentionState = "query_key"
  attention: str = "auto"

  def __post_init__(self) -> None:
    check_fields(self, "bench")
    allowed = _MESHES.get(self.kind, ()) if self.who == "sa_jax" else ()
    wrong = Compute(attention=self.attention).unknown()
    if refused := [name for name, size in self.mesh.axes().items() if size > 1 and name not in allowed]:
      what = self.kind if self.who == "sa_jax" else f"the peer {self.who}"
      takes = f"takes {', '.join(allowed)}" if allowed else "runs on one device"
      wrong.append(f"{' and '.join(refused)} ({what} {takes})")
    if self.value_dim is not None and self.who != "sa_jax":
      wrong.append(f"value_dim {self.value_dim} (the peer {self.who} does not support narrow values)")
    if self.batch_size * self.length >= _MOST:
      wrong.append(f"batch_size {self.batch_size} of `length` {self.length} (must be fewer than {_MOST:,} tokens)")
    if not wrong and self.batch_size % self.mesh.ways:
      wrong.append(f"batch_size {self.batch_size} (must be a multiple of {self.mesh.ways_spelt})")
    if not wrong and self.length % self.mesh.sequence:
      wrong.append(f"`length` {self.length} (must be a multiple of sequence = {self.mesh.sequence})")
    if self.kind == "decode" and not STEPS <= self.tokens <= self.length:
      wrong.append(f"{self.tokens} filled slots of {self.length} (must be {STEPS}, the steps of a call, to all)")
    if self.kind == "decode" and self.who != "sa_jax" and self.length < 6 * STEPS:
      wrong.append(f"`length` {self.length} (must be at least {6 * STEPS} for peers)")
    if not wrong and self.kind == "batching" and self.requests % self.batch_size:
      wrong.append(f"{self.requests} requests (must be a multiple of batch_size {self.batch_size}, for batches)")
    if self.kind == "batching" and self.length < (needed := PROMPT + LONGEST_ANSWER - 1):
      wrong.append(f"`length` {self.length} (must be at least {needed} slots, for the longest request)")
    wrong += [
      f"{field.name} ({self.kind} does not use it; it is for {', '.join(_ONLY[field.name])})"
      for field in dataclasses.fields(self)
      if self.kind not in _ONLY.get(field.name, (self.kind,)) and getattr(self, field.name) != field.default
    ]
    if wrong:
      raise UserError.of("bench", wrong)

  @property
  def config(self) -> ModelConfig:
    """The preset with the task's depth and compute settings, without an end token.

    Raises:
      UserError: if the preset is unknown, or the depth is invalid.
    """
    preset = ModelConfig.preset(self.model)
    return dataclasses.replace(
      preset,
      num_layers=preset.num_layers if self.layers is None else self.layers,
      eos_token_ids=(),
      attention=self.attention,
      attention_state=self.attention_state,
      cache_dtype=self.cache_dtype,
      value_dim=self.value_dim,
    )

  @property
  def tokens(self) -> int:
    """Tokens per row."""
    return self.length if self.filled is None else self.filled


_MOST = 2**31
"""Limit on tokens per batch, more than any device can hold."""

_MESHES = {"step": MESH_AXES, "decode": ("tensor",)}
"""The mesh axes that each kind supports."""

_STACKS = ("prefill", "train", "step")
_ONLY = {
  "filled": ("decode",),
  "cache_dtype": ("decode", "batching"),
  "requests": ("batching",),
  "attention": _STACKS,
  "attention_state": _STACKS,
  "remat": ("step", "train"),
  "group_backward": ("step", "train"),
}
"""The kinds that a setting applies to, if not all."""


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a measurement.

  Attributes:
    task: the task.
    seconds: median time of a decode step, forward pass, gradient or train step, or of all requests together.
    low: fastest.
    high: slowest.
    work: minimum bytes to move (decode), FLOPs without recomputation (prefill, train, step), or tokens (batching).
    ceiling: bytes or FLOPs per second of a copy or a matrix product on the same device or devices in the same process;
      0 if there is none.
    temp_bytes: temporary memory of the compiled program per device, if known.
    device: the accelerator, and the number of devices.
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
    """Work per second."""
    return self.work / self.seconds

  @property
  def share(self) -> float | None:
    """The achieved fraction of the ceiling."""
    return self.rate / self.ceiling if self.ceiling else None


def task_of(values: Mapping[str, Any]) -> Task:
  """A task from its JSON values."""
  return Task(**{**values, "mesh": MeshSizes(**values["mesh"])})


def run_task(task: Task) -> Result:
  """Measures in a new process.

  Raises:
    UserError: if the measurement failed; quotes the end of its output.
  """
  # -P: import nothing from the current folder
  command = [sys.executable, "-P", "-m", "sa_jax.bench.worker", json.dumps(dataclasses.asdict(task))]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    reason = (done.stderr or done.stdout).strip()[-2000:]
    raise UserError(f"bench {task.kind}, {task.who}, {task.model}, {task.plan}, S {task.length}: {reason}")
  values: dict[str, Any] = json.loads(lines[-1])
  return Result(**values | {"task": task_of(values["task"])})
