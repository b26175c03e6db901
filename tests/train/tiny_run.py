"""A training run of seconds. As a program: one that dies, is stopped, or runs out of disk at a given step.

python -m tests.train.tiny_run OUT kill 7        # SIGKILL itself after step 7
python -m tests.train.tiny_run OUT save 8 0.01   # 0.01 s into the writing of the checkpoint of step 8
python -m tests.train.tiny_run OUT stop 7        # SIGTERM
python -m tests.train.tiny_run OUT full 8        # files cannot grow while step 8 is written
python -m tests.train.tiny_run OUT               # to the end; flags of `sa-jax train` may follow
"""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import jax

from sa_jax import ModelConfig
from sa_jax.distributed import Hosts, start
from sa_jax.mesh import MeshSizes
from sa_jax.train.config import DataConfig, LogConfig, TrainConfig
from sa_jax.train.data import Reading
from sa_jax.train.optimizer import OptimizerConfig

STEPS, SAVE_EVERY = 20, 4
SHAPE = ModelConfig(
  vocab_size=264, embed_dim=16, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, tie_embeddings=True
)
TEXT = "\n\n".join(
  f"Sentence {number} says {number * number % 97} and then {'no' * (number % 5)} more." for number in range(300)
)


def config(out: Path, **changes) -> TrainConfig:
  """The run; its data lie beside its folder."""
  text = out.parent / "text.txt"
  if not text.exists():
    text.write_text(TEXT)
  values = {
    "shape": SHAPE,
    "plan": "1:2",
    "mode": "pretrain",
    "batch_size": 8,
    "steps": STEPS,
    "dtype": "float32",
    "data": DataConfig(train=(text,), length=32, reading=Reading(documents="blank_lines")),
    "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    "log": LogConfig(log_every=1, save_every=SAVE_EVERY, keep=2, tensorboard=False),
  }
  return TrainConfig(**({"out": out} | values | changes))


def main(out: str, event: str = "", step: str = "0", *more: str) -> None:
  if event == "shard" and more:
    start(Hosts(coordinator=f"127.0.0.1:{more[0]}", processes=2, process=int(more[1])))
  from sa_jax.train.checkpoints import Checkpoints
  from sa_jax.train.interruption import Interruption
  from sa_jax.train.loop import Loop, train

  at = int(step)
  end = lambda: os.kill(os.getpid(), signal.SIGKILL)
  run_step, save = Loop._step, Checkpoints.save

  def step_then(self):
    run_step(self)
    if self.done == at:
      os.kill(os.getpid(), signal.SIGKILL if event == "kill" else signal.SIGTERM)

  def save_and(self, done, state, extra):
    if done != at:
      return save(self, done, state, extra)
    self.wait()
    if event == "full":
      resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    else:
      threading.Timer(float(more[0]), end).start()
    save(self, done, state, extra)
    self.wait()

  if event in ("kill", "stop"):
    Loop._step = step_then
  elif event in ("save", "full"):
    Checkpoints.save = save_and
  elif event == "shard":
    Interruption.requested = lambda self, done: done == at
  try:
    outcome = train(
      config(Path(out), mesh=MeshSizes(slice=2, fsdp=jax.device_count() // 2) if event == "shard" else MeshSizes()),
      say=print,
    )
  except ValueError as error:
    sys.exit(str(error))
  sys.exit(143 if outcome.interrupted else 0)


if __name__ == "__main__":
  main(*sys.argv[1:])
