"""One measurement, run in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any, Literal

from sa_jax.config import AttentionBackend, AttentionState, CacheDtype, ModelConfig, RematPolicy
from sa_jax.errors import UserError
from sa_jax.sharding import MESH_AXES

Kind = Literal["decode", "prefill", "train", "step", "batching"]
Who = Literal["sa_jax", "hf-compiled", "hf-eager"]

STEPS = 32
"""Decode steps of one timed call."""


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
    filled: decode: how many of the slots have tokens at the end; all when None.
    layers: depth; the preset's when None.
    who: whose code: ours, or transformers' on torch, compiled or not.
    attention_state: as in `ModelConfig`.
    attention: as in `ModelConfig`.
    remat: step and train: as in `ModelConfig`; of peers, gradient checkpointing unless ``none``.
    cache_dtype: as in `ModelConfig`.
    requests: batching: how many.
    repeats: timed calls.
    data: step: mesh size over which rows are split; see `sa_jax.sharding.make_mesh`.
    fsdp: step: over which rows and parameters are split.
    tensor: step and decode: over which heads, MLP and vocabulary are split.
    sequence: step: over which the tokens of a row are split.

  Raises:
    UserError: if the kind or who runs it knows no such mesh or setting, or rows, tokens or requests do not divide; if
      more slots are filled than there are, or fewer than a call has steps.
  """

  kind: Kind
  model: str
  plan: str = "dense"
  batch: int = 1
  seq_len: int = 1024
  filled: int | None = None
  layers: int | None = None
  who: Who = "sa_jax"
  attention_state: AttentionState = "query_key"
  attention: AttentionBackend = "auto"
  remat: RematPolicy = "full"
  cache_dtype: CacheDtype = None
  requests: int = 256
  repeats: int = 10
  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self) -> None:
    sizes, allowed = self.mesh, _MESHES.get(self.kind, ()) if self.who == "sa_jax" else ()
    wrong = [f"{name} {size} (at least 1 is needed)" for name, size in sizes.items() if size < 1]
    if refused := [name for name, size in sizes.items() if size > 1 and name not in allowed]:
      what = self.kind if self.who == "sa_jax" else f"the peer {self.who}"
      takes = f"takes {', '.join(allowed)}" if allowed else "runs on one device"
      wrong.append(f"{' and '.join(refused)} ({what} {takes})")
    if not wrong and self.batch % (self.data * self.fsdp):
      wrong.append(f"batch_size {self.batch} (a multiple of data × fsdp = {self.data * self.fsdp} is needed)")
    if not wrong and self.seq_len % self.sequence:
      wrong.append(f"`length` {self.seq_len} (a multiple of sequence = {self.sequence} is needed)")
    if self.kind == "decode" and not STEPS <= self.tokens <= self.seq_len:
      wrong.append(f"{self.tokens} filled slots of {self.seq_len} (from {STEPS}, the steps of a call, to all)")
    if self.kind == "decode" and self.who != "sa_jax" and self.seq_len < 6 * STEPS:
      wrong.append(f"`length` {self.seq_len} (peers need {6 * STEPS} slots)")
    if self.kind == "batching" and self.requests % self.batch:
      wrong.append(f"{self.requests} requests (a multiple of batch_size {self.batch} is needed, for static batches)")
    wrong += [
      f"{field.name} ({self.kind} takes none: it is for {', '.join(_ONLY[field.name])})"
      for field in dataclasses.fields(self)
      if self.kind not in _ONLY.get(field.name, (self.kind,)) and getattr(self, field.name) != field.default
    ]
    if wrong:
      raise UserError.of("bench", wrong)

  @property
  def config(self) -> ModelConfig:
    """The preset with the task's depth and way to compute; it never ends a row by itself.

    Raises:
      UserError: if there is no such preset, or no such depth.
    """
    preset = ModelConfig.preset(self.model)
    return dataclasses.replace(
      preset,
      num_layers=preset.num_layers if self.layers is None else self.layers,
      eos_token_ids=(),
      attention=self.attention,
      attention_state=self.attention_state,
      cache_dtype=self.cache_dtype,
    )

  @property
  def tokens(self) -> int:
    """Tokens a row."""
    return self.seq_len if self.filled is None else self.filled

  @property
  def mesh(self) -> dict[str, int]:
    """The sizes of the mesh, by axis."""
    return {name: getattr(self, name) for name in MESH_AXES}


_MESHES = {"step": MESH_AXES, "decode": ("tensor",)}
"""The axes over which a kind can be split."""

_STACKS = ("prefill", "train", "step")
_ONLY = {
  "filled": ("decode",),
  "cache_dtype": ("decode", "batching"),
  "requests": ("batching",),
  "attention": _STACKS,
  "attention_state": _STACKS,
  "remat": ("step", "train"),
}
"""The kinds that a setting means something to, where it does not to all."""


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
    ceiling: bytes or FLOPs a second that the device reached in the same process, on a copy or a matrix product, or that
      several devices reached together; 0 where there is none.
    temp_bytes: temporaries of the compiled program on one device, where it is known.
    device: the card, and how many.
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
    UserError: if the measurement failed; the end of its output says why.
  """
  # -P: nothing of the current folder is imported.
  command = [sys.executable, "-P", "-m", "sa_jax.bench.worker", json.dumps(dataclasses.asdict(task))]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    reason = (done.stderr or done.stdout).strip()[-2000:]
    raise UserError(f"bench {task.kind}, {task.who}, {task.model}, {task.plan}, S {task.seq_len}: {reason}")
  values: dict[str, Any] = json.loads(lines[-1])
  return Result(**values | {"task": Task(**values["task"])})
