"""What a training run is: a dataclass, whose fields are the flags of ``sa-jax train`` and what a config file makes."""

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
from sa_jax.fields import Count, Natural, NotNegative, Portion, Positive, Seed, Such, check_fields
from sa_jax.files import as_path
from sa_jax.mesh import MeshSizes
from sa_jax.storage import local_copy
from sa_jax.train.data import Reading
from sa_jax.train.data.packing import Packing, TooLong
from sa_jax.train.lora import LoraConfig
from sa_jax.train.objective import RouterConfig
from sa_jax.train.optimizer import OptimizerConfig

Steps = Annotated[tuple[Natural, Natural], Such(lambda steps: steps[0] <= steps[1], "the first before the second")]


def _is_day(text: str) -> bool:
  try:
    return bool(datetime.date.fromisoformat(text))
  except ValueError:
    return False


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read, and how rows are made of it."""

  train: tuple[Path, ...] = ()
  """Text, .jsonl, .json, .parquet, .arrow or .array_record files (text, prompt and completion, Alpaca, chats)."""
  dataset: str | None = None
  """Or a dataset of the Hugging Face hub, or a folder of that form, read while training."""
  subset: str | None = None
  """Of the dataset: its configuration, if it has several."""
  split: str = "train"
  """Of the dataset."""
  eval: tuple[Path, ...] = ()
  """Files to evaluate on during training."""
  length: Annotated[int, Such(lambda n: n >= 2, "at least 2 tokens, one to predict from and one to predict,")] = 1024
  """Tokens a row."""
  packing: Packing = "rows"
  """Whether rows hold several documents, or one each (for attention kernels without segments)."""
  too_long: TooLong = "error"
  """What becomes of samples with a prompt that are longer than a row: an error, or cut and counted."""
  reading: Reading = dataclasses.field(default_factory=Reading)
  """How files are read."""

  def __post_init__(self) -> None:
    check_fields(self, "data")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """What the student learns from the dense model that it came from (``mode="distill"``)."""

  temperature: Positive = 1.0
  """That both distributions are softened by."""
  teacher_weight: Portion = 1.0
  """Weight of the divergence from the dense model; the rest, up to 1, is that of the ordinary loss."""
  hidden_weight: NotNegative = 0.0
  """Weight of the distance of each layer's output from the dense model's, besides."""

  def __post_init__(self) -> None:
    check_fields(self, "distillation")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is said, saved and measured on the way."""

  log_every: Count = 10
  """Steps between two lines of metrics."""
  eval_every: Count = 200
  """Steps between two evaluations; there is one at the end too."""
  eval_batches: Count | None = None
  """Evaluate on this many batches at most; None for all."""
  save_every: Count = 500
  """Steps between two checkpoints; there is one at the end too."""
  keep: Count = 2
  """How many checkpoints stay."""
  export_every: Count | None = None
  """Steps between two models in models/, from step 0 on, each as training would leave it if it ended there."""
  minutes: Positive | None = None
  """Stop after so long, as a signal would: what is done is saved, and the same command goes on from there."""
  profile: Annotated[Steps | None, tyro.conf.arg(metavar="FIRST LAST")] = None
  """Record a profile (TensorBoard, Perfetto) from before the first of these steps to after the second."""
  peak_tflops: Positive | None = None
  """A device's peak rate, which MFU is stated against; None for the known rate of the device, if it is known."""
  tensorboard: bool = True
  """Also write TensorBoard's files."""
  wandb: str | None = None
  """Also log to this project of Weights & Biases."""

  def __post_init__(self) -> None:
    check_fields(self, "log")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run.

  Attributes are described where they are flags: ``sa-jax train --help``.

  Raises:
    UserError: if values contradict each other; all that do are named.
  """

  out: Path
  """The run's folder: metrics, checkpoints, and at the end the model. A run that is there already is resumed."""
  model: Path | None = None
  """The checkpoint to start from: a Hugging Face folder, a GGUF file or an sa_jax checkpoint."""
  teacher: Path | None = None
  """The dense checkpoint to distil from, if the model is not one."""
  preset: str | None = None
  """Or the shape, by name, of a model to train from scratch."""
  shape: Annotated[ModelConfig | None, tyro.conf.Suppress] = None
  """Or the shape itself, in a config file."""
  tokenizer: str | None = None
  """A folder or GGUF file with the tokenizer, or 'bytes'; None for the model's own, and bytes from scratch."""
  plan: str | None = None
  """Which layers share, such as 22:23-26; None for the model's own plan, dense from scratch."""
  mode: Literal["pretrain", "sft", "distill"] = "sft"
  """What is learnt: every token; only answers, if data have prompts; or what the dense model predicts for every one."""
  method: Literal["full", "lora"] = "full"
  """What is trained: every parameter, or low-rank adapters."""
  gradual_steps: Natural = 0
  """Steps over which followers pass from their own weights to their anchor's; 0 for at once."""
  batch_size: Count = 32
  """Rows a step, on all devices together."""
  accumulate: Count = 1
  """In how many parts a batch is computed, one after the other."""
  steps: Count = 1000
  """How many steps to train."""
  remat: RematChoice = "auto"
  """What the backward pass recomputes; auto for the fastest that fits in what JAX may take of a device, and none where
  devices do not tell how much that is."""
  dtype: FloatDtype = "bfloat16"
  """What is computed in, and what the model is saved in at the end; trained parameters are float32."""
  z_loss: float = 0.0
  """Weight of the squared logarithm of the softmax's denominator."""
  seed: Seed = 0
  """Of the order of the data and of what is initialised."""
  date: Annotated[str, Such(_is_day, "a day such as 2026-11-30")] | None = None
  """The day, such as 2026-11-30, for chat templates that write one; None for the day on which the run begins."""
  max_skipped: Count = 10
  """Stop after this many steps in a row whose loss or gradient is not finite; each of them changes nothing."""
  data: DataConfig = DataConfig()
  """Data."""
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  """AdamW."""
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  """Adapters."""
  router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
  """Routers of a mixture of experts."""
  distill: DistillConfig = DistillConfig()
  """Distillation."""
  mesh: MeshSizes = MeshSizes()
  """All devices, as sizes of data, fsdp, expert, tensor, sequence and slice; 1 if not named, and of data what is
  left."""
  log: LogConfig = LogConfig()
  """Logs and checkpoints."""

  def __post_init__(self) -> None:
    check_fields(self, "training")
    wrong = []
    given = [name for name in ("model", "preset", "shape") if getattr(self, name) is not None]
    if not given:
      wrong.append("either a checkpoint to start from (`model`) or a shape to train from scratch (`preset`) is needed")
    if len(given) > 1:
      wrong.append(f"{' and '.join(f'`{name}`' for name in given)} each say what to start from: one is needed")
    if self.model is None and self.mode == "distill":
      wrong.append("`mode=distill` needs a checkpoint (`model`), whose dense model is the teacher")
    if self.model is None and self.method == "lora":
      wrong.append("`method=lora` needs a checkpoint (`model`) to adapt")
    if self.gradual_steps and self.model is None:
      wrong.append("`gradual_steps` needs a checkpoint (`model`), whose followers' own weights it starts from")
    if self.teacher is not None and self.mode != "distill":
      wrong.append("`teacher` is of use in `mode=distill` only")
    if self.mode == "distill" and self.z_loss:
      wrong.append("`z_loss` is of use outside `mode=distill` only")
    if self.mode != "distill" and self.distill != DistillConfig():
      wrong.append("`temperature`, `teacher_weight` and `hidden_weight` are of use in `mode=distill` only")
    if self.method != "lora" and self.lora != LoraConfig():
      wrong.append("`rank`, `alpha` and `targets` are of use with `method=lora` only")
    if self.mode == "distill" and self.router != RouterConfig():
      wrong.append("`load_balance` and `router_z_loss` are of use outside `mode=distill` only")
    if self.gradual_steps > self.steps:
      wrong.append(f"`gradual_steps={self.gradual_steps}` needs as many `steps`, not {self.steps}")
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
  sys.modules[spec.name] = module  # dataclasses of the file's own look their module up
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"{path} fails: {type(error).__name__}: {error}") from error
  config = getattr(module, "config", None)
  if not isinstance(config, TrainConfig):
    raise UserError(f"{path} needs a variable 'config' that is a sa_jax.train.TrainConfig")
  return config


def recorded(config: TrainConfig) -> dict[str, Any]:
  """What decides a run's numbers, as JSON values: the config without where it runs and what it says on the way."""
  free = ("out", "mesh", "log")
  values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
  values["data"]["reading"].pop("cache")
  values["data"].pop("eval")
  if config.shape is not None:
    values["shape"].pop("group_backward")  # how a model is computed, and training has it always
  return {name: value for name, value in values.items() if name not in free}


def check_same(config: TrainConfig, before: Mapping[str, object], folder: Path) -> None:
  """Checks that a run is the one that its folder holds, or that one with more steps where its schedule allows this.

  Raises:
    UserError: names what differs.
  """
  usual: dict[str, object] = {"optimizer.schedule": "cosine", "data.split": "train"}
  usual |= _flat(dataclasses.asdict(RouterConfig()), "router.")
  now, then = _flat(recorded(config)), usual | _flat(before)
  if config.date is None:
    now["date"] = then.get("date")
  now["remat"] = then.get("remat")  # how a step is computed, and on a smaller device it may have to be otherwise
  different = [name for name in {**now, **then} if now.get(name) != then.get(name)]
  if different == ["steps"]:
    if config.optimizer.schedule == "constant":
      return
    raise UserError(
      f"{folder} holds a run of {then['steps']} steps, over which its learning rate falls, so that it cannot have "
      f"{config.steps}; train a new run from its model ({folder / 'model'}), or begin with `schedule=constant`"
    )
  if different:
    listed = [f"{name} is {now.get(name)}, there it is {then.get(name)}" for name in different]
    raise UserError.of(f"{folder} holds another run; name a new folder (`out`), or remove this one", listed)


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
  out: dict[str, object] = {}
  for name, value in values.items():
    out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return out
