"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sa_jax.distributed import of_first_process, wait_for_all
from sa_jax.errors import UserError
from sa_jax.files import make_folder, write_text
from sa_jax.formats.extras import read_json
from sa_jax.formats.orbax_folder import is_checkpoint
from sa_jax.train import config as configs
from sa_jax.train.checkpoints import Checkpoints
from sa_jax.train.config import TrainConfig
from sa_jax.train.data import in_order, shuffled, to_devices
from sa_jax.train.interruption import Interruption
from sa_jax.train.metrics import Clock, Recorder, Window, peak_tflops, train_flops
from sa_jax.train.setup import Run, prepare
from sa_jax.train.step import Metrics


class Outcome(NamedTuple):
  """Attributes:
  step: the last step that was done.
  interrupted: whether a signal ended the run before its last step; run it again to go on.
  skipped: steps that changed nothing, since their loss or gradient was not finite.
  eval_loss: at the last evaluation, in nats a token; None if there was none.
  model: the finished model, a checkpoint that `sa_jax.from_pretrained` opens; None if the run is not finished.
  """

  step: int
  interrupted: bool
  skipped: int
  eval_loss: float | None
  model: Path | None


def train(config: TrainConfig, say: Callable[[str], None] = lambda text: None) -> Outcome:
  """Trains, from the newest checkpoint in the run's folder if it has one.

  Losses and parameters do not depend on how often a run is interrupted, nor by what.

  Args:
    config: the run.
    say: is told, in sentences, what was read and from where the run goes on.

  Raises:
    UserError: if something in the config, the data or the file system does not work, before anything is compiled
      where it can be known then; or if too many steps in a row are not finite.
  """
  config = _dated(config, _check_folder(config))
  run = prepare(config, say)
  _claim_folder(config)
  with Checkpoints(config.out / "checkpoints", config.log.keep) as checkpoints:
    done = checkpoints.latest or 0
    with Recorder(config.out, config.steps, done, tensorboard=config.log.tensorboard) as recorder:
      if done:
        say(f"goes on after step {done}, from {config.out}")
      loop = Loop(config, run, checkpoints)
      interrupted = loop.run(recorder)
  model = None
  if not interrupted:
    model = config.out / "model"
    if _is_missing(model):
      run.export(loop.state.params, model)
  return Outcome(loop.done, interrupted, loop.window.skipped, loop.eval_loss, model)


def _is_missing(model: Path) -> bool:
  """Whether a model has not been written yet; an empty folder of its name is none, and is removed."""
  if model.is_dir() and not any(model.iterdir()) and jax.process_index() == 0:
    model.rmdir()
  return not is_checkpoint(model)


def _check_folder(config: TrainConfig) -> dict[str, object]:
  """Checks that the run's folder, if it is there, is this run's; returns what it says of it."""
  path = config.out / "config.json"
  if path.exists():
    before = read_json(path)
    configs.check_same(config, before, config.out)
    return before
  if any((config.out / "checkpoints").glob("[0-9]*")):
    raise UserError(
      f"{config.out} has checkpoints but no config.json that says of which run; name a new folder (`out`), or remove "
      "this one"
    )
  return {}


def _dated(config: TrainConfig, before: dict[str, object]) -> TrainConfig:
  """The run with its date: its own, that of the day on which it began, or today, as the first process sees it."""
  if config.date is None and isinstance(begun := before.get("date"), str):
    return dataclasses.replace(config, date=begun)
  if config.date is None:
    today = datetime.datetime.now().date().toordinal()
    return dataclasses.replace(config, date=datetime.date.fromordinal(of_first_process(today)).isoformat())
  return config


def _claim_folder(config: TrainConfig) -> None:
  """Makes the run's folder, and writes into it which run it is."""
  wait_for_all("checked")
  if jax.process_index() == 0:
    make_folder(config.out)
    write_text(config.out / "config.json", json.dumps(configs.recorded(config), indent=2) + "\n")


class Loop:
  """A run under way.

  Attributes:
    done: the last step that was done.
    state: after it.
    window: what is counted over steps.
    eval_loss: of the last evaluation.
  """

  def __init__(self, config: TrainConfig, run: Run, checkpoints: Checkpoints) -> None:
    """Takes up the newest checkpoint, or makes the state of step 0."""
    self._config, self._run, self._checkpoints = config, run, checkpoints
    self._data = shuffled(run.rows, config.batch_size, config.seed, run.mine)
    self.done, self.window = 0, Window()
    self.eval_loss: float | None = None
    if checkpoints.latest is None:
      self.state = run.make_state()
    else:
      self.state, extra = checkpoints.restore(run.abstract_state())
      self.done, self.window = checkpoints.latest, Window(**extra["window"])
      self.eval_loss = extra["eval_loss"]
      if (extra["rows"], extra["checksum"]) != (len(run.rows), run.rows.corpus.checksum):
        raise UserError(
          f"the training data have changed since {config.out} was begun ({extra['rows']} rows then, {len(run.rows)} "
          "now); name a new folder (`out`), or bring the data back"
        )
      self._data.set_state(extra["data"])
    self._unseen: tuple[int, Metrics] | None = None
    self._profiling = False
    self._clock = Clock()
    flops = train_flops(run.model.config, run.model.plan, config.batch_size, config.data.length)
    peak = peak_tflops(config.log.peak_tflops)
    self._mfu_seconds = flops / (peak * 1e12 * jax.device_count()) if peak else None

  def run(self, recorder: Recorder) -> bool:
    """Trains to the last step; returns whether a signal ended that early. Either way the state is on disk then."""
    config, log = self._config, self._config.log
    with Interruption(log.minutes) as interruption:
      self._export()
      while self.done < config.steps:
        self._profile(starting=True)
        self._step(recorder)
        last = self.done == config.steps
        stop = interruption.requested(self.done) and not last
        self._profile(starting=False, stopping=stop)
        if self._run.eval_rows is not None and (last or self.done % log.eval_every == 0):
          self._evaluate(recorder)
        if last or stop or self.done % log.save_every == 0:
          self._save(recorder)
        self._export()
        self._checkpoints.check()
        recorder.advance(self.done)
        if stop:
          return True
    return False

  def _step(self, recorder: Recorder) -> None:
    """Starts a step, and looks at the one before it while the device computes."""
    batch = to_devices(next(self._data), self._run.batch_sharding, self._config.batch_size)
    self.state, metrics = self._run.step(self.state, self._run.frozen, batch)
    self.done += 1
    self._look(recorder)
    self._unseen = self.done, metrics

  def _look(self, recorder: Recorder) -> None:
    """Waits for the last step that was not looked at, counts it, and writes a line if it is time for one.

    Raises:
      UserError: if too many steps in a row were not finite.
    """
    if self._unseen is None:
      return
    step, metrics = self._unseen
    self._unseen = None
    loss, norm, weight, finite = (float(value) for value in jax.device_get(dataclasses.astuple(metrics)))
    self.window.add(loss, weight, bool(finite))
    self._clock.tick()
    if self.window.in_row >= self._config.max_skipped:
      latest = self._checkpoints.latest
      raise UserError(
        f"loss or gradient were not finite in {self.window.in_row} steps in a row, up to step {step} (loss {loss}, "
        f"gradient norm {norm}); none of them changed the parameters. "
        + ("There is no checkpoint yet" if latest is None else f"The last checkpoint is of step {latest}")
        + ". Look at the data, or lower `learning_rate`"
      )
    if step % self._config.log.log_every == 0 or step == self._config.steps:
      recorder.write(step, self._line(norm))

  def _line(self, norm: float) -> dict[str, float]:
    seconds = self._clock.lap()
    rows, length = self._config.batch_size, self._config.data.length
    values = {"loss": self.window.close(), "grad_norm": norm, "tokens": self.window.seen}
    if self.window.skipped:
      values["skipped"] = self.window.skipped
    if seconds is not None:
      values["tokens_per_second"] = rows * length / seconds
      if self._mfu_seconds is not None:
        values["mfu"] = self._mfu_seconds / seconds
    return values

  def _evaluate(self, recorder: Recorder) -> None:
    """Loss and perplexity on the evaluation data."""
    self._look(recorder)
    began = time.perf_counter()
    run, config = self._run, self._config
    assert run.eval_rows is not None
    batches = in_order(run.eval_rows, config.batch_size, run.mine, config.log.eval_batches)
    placed = (to_devices(batch, run.batch_sharding, config.batch_size) for batch in batches)
    # One batch on the devices at a time.
    sums = [jax.device_get(run.evaluate(self.state.params, run.frozen, batch)) for batch in placed]
    total, weight = np.asarray(sums, np.float64).sum(axis=0)
    self.eval_loss = float(total / weight)
    perplexity = math.exp(min(self.eval_loss, 700.0))
    recorder.write(self.done, {"eval_loss": self.eval_loss, "eval_perplexity": perplexity})
    self._clock.pause(time.perf_counter() - began)

  def _export(self) -> None:
    """Writes the model of this step, if it is time for one and a run before has not done so."""
    every, path = self._config.log.export_every, self._config.out / "models" / str(self.done)
    if every is not None and self.done % every == 0 and _is_missing(path):
      began = time.perf_counter()
      self._run.export(self.state.params, path)
      self._clock.pause(time.perf_counter() - began)

  def _save(self, recorder: Recorder) -> None:
    self._look(recorder)
    began = time.perf_counter()
    extra = {
      "data": self._data.get_state(),
      "rows": len(self._run.rows),
      "checksum": self._run.rows.corpus.checksum,
      "window": dataclasses.asdict(self.window),
      "eval_loss": self.eval_loss,
    }
    self._checkpoints.save(self.done, self.state, extra)
    self._clock.pause(time.perf_counter() - began)

  def _profile(self, *, starting: bool, stopping: bool = False) -> None:
    """Opens the profile's window before its first step, and closes it after its last one, or when the run stops."""
    first, last = self._config.log.profile or (0, 0)
    if starting and not self._profiling and first <= self.done + 1 <= last:
      jax.profiler.start_trace(str(self._config.out / "profile"))
      self._profiling = True
    elif self._profiling and not starting and (stopping or self.done >= min(last, self._config.steps)):
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self._profiling = False
