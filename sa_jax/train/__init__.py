"""Training: what is minimised, how, and over what."""

from sa_jax.train.batch import Batch
from sa_jax.train.objective import next_token
from sa_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from sa_jax.train.step import Metrics, Objective, TrainState, make_eval, make_state, make_step, state_shardings

__all__ = [
  "Batch",
  "Metrics",
  "Objective",
  "OptimizerConfig",
  "TrainState",
  "make_eval",
  "make_optimizer",
  "make_state",
  "make_step",
  "next_token",
  "schedule",
  "state_shardings",
]
