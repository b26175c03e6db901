"""The config of a training run: a dataclass whose fields are the flags of ``sa-jax train``."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sa_jax.config import FloatDtype, ModelConfig, RematChoice
from sa_jax.errors import UserError
from sa_jax.fields import Constraint, Count, Natural, NotNegative, Portion, Positive, Seed, check_fields
from sa_jax.files import as_path
from sa_jax.mesh import MeshSizes
from sa_jax.storage import local_copy
from sa_jax.train.data import Reading
from sa_jax.train.data.packing import Packing, TooLong
from sa_jax.train.lora import LoraConfig
from sa_jax.train.objective import RouterConfig
from sa_jax.train.optimizer import OptimizerConfig

Steps = Annotated[tuple[Natural, Natural], Constraint(lambda steps: steps[0] <= steps[1], "in ascending order")]


def _is_day(text: str) -> bool:
  try:
    return bool(datetime.date.fromisoformat(text))
  except ValueError:
    return False


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Training data and how to pack it."""

  train: tuple[Path, ...] = ()
  """Text, .jsonl, .json, .parquet, .arrow or .array_record files (text, prompt and completion, Alpaca, chats)."""
  dataset: str | None = None
  """Or a Hugging Face dataset, or a folder in that format, streamed during training."""
  subset: str | None = None
  """Configuration of the dataset, if it has several."""
  split: str = "train"
  """Split of the dataset."""
  eval: tuple[Path, ...] = ()
  """Files to evaluate on during training."""
  length: Annotated[int, Constraint(lambda n: n >= 2, "at least 2 tokens, an input and a target")] = 1024
  """Tokens per row."""
  packing: Packing = "rows"
  """Pack several documents per row, or one each (for attention kernels without segments)."""
  too_long: TooLong = "error"
  """Prompted samples longer than a row: raise an error, or truncate and count them."""
  reading: Annotated[Reading, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Reading)
  """File reading."""

  def __post_init__(self) -> None:
    check_fields(self, "data")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Distillation from the dense model (``mode="distill"``)."""

  temperature: Positive = 1.0
  """Softmax temperature for teacher and student."""
  teacher_weight: Portion = 1.0
  """Weight of the divergence from the dense model; the remainder, up to 1, weights the ordinary loss."""
  hidden_weight: NotNegative = 0.0
  """Weight of an additional loss: each layer's distance from the dense model's output."""

  def __post_init__(self) -> None:
    check_fields(self, "distillation")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Logging, checkpoints and evaluation during a run."""

  log_every: Count = 10
  """Steps between lines of metrics."""
  eval_every: Count = 200
  """Steps between evaluations; there is also one at the end."""
  eval_batches: Count | None = None
  """Maximum number of batches per evaluation; None for all."""
  save_every: Count = 500
  """Steps between checkpoints; there is also one at the end."""
  keep: Count = 2
  """Number of checkpoints to keep."""
  export_every: Count | None = None
  """Steps between models exported to models/, starting at step 0."""
  minutes: Positive | None = None
  """Stop after this time, as after a signal: progress is saved, and the same command continues."""
  profile: Annotated[Steps | None, tyro.conf.arg(metavar="FIRST LAST")] = None
  """Profile (TensorBoard, Perfetto) from the first of these steps through the second."""
  peak_tflops: Positive | None = None
  """A device's peak rate for MFU; None for the device's known rate, if any."""
  tensorboard: bool = True
  """Also write TensorBoard files."""
  wandb: str | None = None
  """Also log to this Weights & Biases project."""

  def __post_init__(self) -> None:
    check_fields(self, "log")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run.

  ``sa-jax train --help`` describes the attributes.

  Raises:
    UserError: if values contradict each other; lists all of them.
  """

  out: Path
  """The run's folder for metrics, checkpoints and the final model. A run that is already there is resumed."""
  model: Path | None = None
  """The checkpoint to start from: a Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id."""
  teacher: Path | None = None
  """The dense checkpoint to distil from, if the model is not dense."""
  preset: str | None = None
  """Or the name of a preset, to train from scratch."""
  shape: Annotated[ModelConfig | None, tyro.conf.Suppress] = None
  """Or the model config itself, in a config file."""
  tokenizer: str | None = None
  """A folder or GGUF file with the tokenizer, or 'bytes'; None for the model's own, and bytes from scratch."""
  plan: str | None = None
  """Which layers share, such as 22:23-26; None for the model's own plan, dense from scratch."""
  mode: Literal["pretrain", "sft", "distill"] = "sft"
  """pretrain: loss on every token; sft: only on answers, if the data have prompts; distill: the dense model's
  predictions."""
  method: Literal["full", "lora"] = "full"
  """Train all parameters, or low-rank adapters."""
  gradual_steps: Natural = 0
  """Steps over which followers blend from their own attention weights to their anchor's; 0 for immediately."""
  batch_size: Count = 32
  """Rows per step, over all devices."""
  accumulate: Count = 1
  """Number of microbatches for gradient accumulation."""
  steps: Count = 1000
  """Number of training steps."""
  remat: RematChoice = "auto"
  """What the backward pass recomputes; auto takes the fastest policy that fits in device memory, or none if devices do
  not report a memory limit."""
  dtype: FloatDtype = "bfloat16"
  """Type of computation and of the saved model; trained parameters are float32."""
  z_loss: float = 0.0
  """Weight of the z-loss, the squared logarithm of the softmax denominator."""
  seed: Seed = 0
  """Seed of the data order and initialisation."""
  date: Annotated[str, Constraint(_is_day, "a day such as 2026-11-30")] | None = None
  """The date, such as 2026-11-30, for chat templates that insert one; None for the day on which the run starts."""
  max_skipped: Count = 10
  """Stop after this many consecutive steps with a non-finite loss or gradient; such steps are skipped."""
  data: DataConfig = DataConfig()
  """Training data, and how to pack it."""
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  """AdamW and its schedule."""
  lora: Annotated[LoraConfig, tyro.conf.arg(name="adapter")] = dataclasses.field(default_factory=LoraConfig)
  """For method lora: low-rank adapters."""
  router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
  """For a mixture of experts."""
  distill: Annotated[DistillConfig, tyro.conf.arg(name="distillation")] = DistillConfig()
  """For mode distill."""
  mesh: MeshSizes = MeshSizes()
  """Sizes of the mesh axes data, fsdp, expert, tensor, sequence and slice, over all devices; remaining devices go to
  data."""
  log: Annotated[LogConfig, tyro.conf.arg(name="log and checkpoint")] = LogConfig()
  """What is written, and when."""

  def __post_init__(self) -> None:
    check_fields(self, "training")
    wrong = []
    given = [name for name in ("model", "preset", "shape") if getattr(self, name) is not None]
    if not given:
      wrong.append("give a checkpoint to start from (`model`) or a shape to train from scratch (`preset`)")
    if len(given) > 1:
      wrong.append(f"{' and '.join(f'`{name}`' for name in given)} each set the starting point: give only one")
    if self.model is None and self.mode == "distill":
      wrong.append("`mode=distill` needs a checkpoint (`model`), whose dense model is the teacher")
    if self.model is None and self.method == "lora":
      wrong.append("`method=lora` needs a checkpoint (`model`) to adapt")
    if self.gradual_steps and self.model is None:
      wrong.append("`gradual_steps` needs a checkpoint (`model`) with the followers' own weights")
    if self.teacher is not None and self.mode != "distill":
      wrong.append("`teacher` only works with `mode=distill`")
    if self.mode == "distill" and self.z_loss:
      wrong.append("`z_loss` does not work with `mode=distill`")
    if self.mode != "distill" and self.distill != DistillConfig():
      wrong.append("`temperature`, `teacher_weight` and `hidden_weight` only work with `mode=distill`")
    if self.method != "lora" and self.lora != LoraConfig():
      wrong.append("`rank`, `alpha` and `targets` only work with `method=lora`")
    if self.mode == "distill" and self.router != RouterConfig():
      wrong.append("`load_balance` and `router_z_loss` do not work with `mode=distill`")
    if self.gradual_steps > self.steps:
      wrong.append(f"`gradual_steps={self.gradual_steps}` needs at least as many `steps`, not {self.steps}")
    if wrong:
      raise UserError.of("training", wrong)


def load_config(path: Path) -> TrainConfig:
  """Runs a config file, a Python program whose variable ``config`` is the run.

  Raises:
    UserError: if it cannot be run, or defines no `TrainConfig`.
  """
  path = local_copy(as_path(path))
  spec = importlib.util.spec_from_file_location("sa_jax_train_config", path)
  if spec is None or spec.loader is None or not path.is_file():
    raise UserError(f"{path} is not a Python file" if path.is_file() else f"there is no file {path}")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses in the file look up their module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"{path} fails: {type(error).__name__}: {error}") from error
  config = getattr(module, "config", None)
  if not isinstance(config, TrainConfig):
    raise UserError(f"{path} must define a variable 'config', a sa_jax.train.TrainConfig")
  return config


def recorded(config: TrainConfig) -> dict[str, Any]:
  """The config values that determine a run's results, as JSON: without output, mesh and logging."""
  free = ("out", "mesh", "log")
  values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
  values["data"]["reading"].pop("cache")
  values["data"].pop("eval")
  if config.shape is not None:
    values["shape"].pop("group_backward")  # a compute setting, always on in training
  return {name: value for name, value in values.items() if name not in free}


def check_same(config: TrainConfig, before: Mapping[str, object], folder: Path) -> None:
  """Checks that a run is the one in its folder, or extends it if the schedule allows.

  Raises:
    UserError: lists the differences.
  """
  usual: dict[str, object] = {"optimizer.schedule": "cosine", "data.split": "train"}
  usual |= _flat(dataclasses.asdict(RouterConfig()), "router.")
  now, then = _flat(recorded(config)), usual | _flat(before)
  if config.date is None:
    now["date"] = then.get("date")
  now["remat"] = then.get("remat")  # changes only how a step is computed; a smaller device may need another policy
  different = [name for name in {**now, **then} if now.get(name) != then.get(name)]
  if different == ["steps"]:
    if config.optimizer.schedule == "constant":
      return
    raise UserError(
      f"{folder} holds a run of {then['steps']} steps whose learning rate decays, so it cannot be extended to "
      f"{config.steps}; start a new run from its model ({folder / 'model'}), or use `schedule=constant` from the start"
    )
  if different:
    listed = [f"{name} is {now.get(name)}, but {then.get(name)} there" for name in different]
    raise UserError.of(f"{folder} holds a different run; use a new folder (`out`), or remove this one", listed)


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
  out: dict[str, object] = {}
  for name, value in values.items():
    out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return out
