"""Training: objectives, optimizer, data and the training loop."""

from sa_jax.train.batch import Batch
from sa_jax.train.config import DataConfig, DistillConfig, LogConfig, TrainConfig
from sa_jax.train.data import Reading
from sa_jax.train.gradual import rising
from sa_jax.train.loop import Outcome, train
from sa_jax.train.lora import LoraConfig, abstract_adapters, adapted, attach, init_adapters, merge
from sa_jax.train.objective import RouterConfig, distill, next_token
from sa_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from sa_jax.train.peft_format import load_adapters, save_adapters
from sa_jax.train.step import Metrics, Objective, TrainState, make_eval, make_state, make_step, state_shardings
from sa_jax.train.writers import Writer

__all__ = [
  # Runs.
  "DataConfig",
  "DistillConfig",
  "LogConfig",
  "Outcome",
  "Reading",
  "TrainConfig",
  "Writer",
  "train",
  # Inputs, state and metrics of a step.
  "Batch",
  "Metrics",
  "TrainState",
  # Objectives.
  "Objective",
  "RouterConfig",
  "distill",
  "next_token",
  "rising",
  # The step.
  "OptimizerConfig",
  "make_eval",
  "make_optimizer",
  "make_state",
  "make_step",
  "schedule",
  "state_shardings",
  # Adapters.
  "LoraConfig",
  "abstract_adapters",
  "adapted",
  "attach",
  "init_adapters",
  "load_adapters",
  "merge",
  "save_adapters",
]
