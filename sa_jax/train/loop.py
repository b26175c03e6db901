"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from sa_jax.display import count
from sa_jax.distributed import check_same, run_on_all
from sa_jax.errors import UserError
from sa_jax.files import remove
from sa_jax.storage import Mirrored
from sa_jax.train.checkpoints import Checkpoints
from sa_jax.train.config import TrainConfig, recorded
from sa_jax.train.data import Examples, every_row_once, to_devices
from sa_jax.train.data.corpus import check_files
from sa_jax.train.folder import checked, claim, describe, is_missing, locked, make_room
from sa_jax.train.interruption import Interruption
from sa_jax.train.metrics import Clock, Window, of_routers, peak_tflops, train_flops
from sa_jax.train.optimizer import schedule
from sa_jax.train.setup import Setup, cautions, echo, prepare
from sa_jax.train.step import Metrics
from sa_jax.train.writers import JsonLines, Screen, TensorBoard, WeightsAndBiases, Writer, closing


class Outcome(NamedTuple):
  """The result of `train`.

  Attributes:
    step: the last step done.
    interrupted: whether a stop request ended the run early; run it again to continue.
    skipped: number of steps skipped because of a non-finite loss or gradient.
    eval_loss: at the last evaluation, in nats per token; None if there was none.
    model: the finished model, a checkpoint that `sa_jax.from_pretrained` opens; None if the run is not finished.
  """

  step: int
  interrupted: bool
  skipped: int
  eval_loss: float | None
  model: Path | None


def train(
  config: TrainConfig,
  source: Examples | None = None,
  *,
  say: Callable[[str], None] = lambda text: None,
  writers: Sequence[Writer] = (),
  console: Console | None = None,
) -> Outcome:
  """Trains, resuming from the newest checkpoint in the run's folder if there is one.

  Losses and parameters do not depend on how often or why a run was interrupted.

  Args:
    config: the run.
    source: examples instead of the config's training files; see `sa_jax.train.data.Stream`.
    say: called with messages about the data and resumption.
    writers: additional metric writers besides those that the config names.
    console: shows the metrics; None for standard output.

  Raises:
    UserError: if the config, the data or the file system is unusable, before compilation if possible; or after too many
      consecutive non-finite steps.
  """
  check_same("configs", config)
  run_on_all("the data", lambda: check_files((*config.data.train, *config.data.eval)), repr)
  with locked(config.out) as check_ours:
    config = checked(config)
    run = prepare(config, say, source)
    config = dataclasses.replace(config, remat=run.remat.policy)
    say(describe(echo(config, run)))
    claim(config)
    with Checkpoints(config.out / "checkpoints", config.log.keep) as checkpoints:
      loop = Loop(config, run, checkpoints, check_ours)
      if loop.done == config.steps:
        say(f"{config.out} has already done its {count(loop.done, 'step')}, so nothing is trained; {_to_go_on(config)}")
      elif loop.done:
        say(f"resuming after step {loop.done} from {config.out}")
      for caution in cautions(config, run.identity[0]) if not loop.done else []:
        say(f"warning: {caution}")
      if loop.done < config.steps and jax.process_index() == 0 and (moved := make_room(config.out, loop.done)):
        say(moved)
      all_writers = [*_writers(config, loop.done, say), *writers] if jax.process_index() == 0 else []
      screen = Screen(console or Console(highlight=False), config.steps, loop.done) if all_writers else None
      with closing([*all_writers, *([screen] if screen else [])]) as write:
        interrupted = loop.run(write, screen.advance if screen else lambda step: None)
    model = None
    if not interrupted:
      model = config.out / "model"
      if is_missing(model):
        run.export(loop.state.params, model)
      _write_adapters(run, loop, config.out / "adapter", say)
  return Outcome(loop.done, interrupted, loop.window.skipped, loop.eval_loss, model)


def _to_go_on(config: TrainConfig) -> str:
  """How a finished run can be continued."""
  if config.optimizer.schedule == "constant":
    return "to train on, repeat the command with more steps"
  return f"its learning rate has decayed, so to train on, start a new run from {config.out / 'model'} in another folder"


def _write_adapters(run: Setup, loop: Loop, path: Path, say: Callable[[str], None]) -> None:
  """Writes the run's adapters again, if it has any that PEFT's format supports."""
  if run.adapters is None:
    return
  if jax.process_index() == 0:
    remove(path)
  try:
    run.adapters(loop.state.params, path)
  except UserError as error:
    say(f"the adapters are merged into the model, but not saved in PEFT's format: {error}")


def _writers(config: TrainConfig, start: int, say: Callable[[str], None]) -> Iterator[Writer]:
  yield JsonLines(config.out, start, say)
  if config.log.tensorboard:
    yield TensorBoard(config.out, start)
  if config.log.wandb is not None:
    yield WeightsAndBiases(config.out, config.log.wandb, recorded(config))


class Loop:
  """A running training loop.

  Attributes:
    done: the last step done.
    state: the state after it.
    window: sums over steps.
    eval_loss: at the last evaluation.
  """

  def __init__(
    self, config: TrainConfig, run: Setup, checkpoints: Checkpoints, check_ours: Callable[[], None] = lambda: None
  ) -> None:
    """Restores the newest readable checkpoint, or creates the state of step 0.

    Args:
      config: the run.
      run: the run's model, data and step.
      checkpoints: the folder's checkpoints.
      check_ours: called before a checkpoint is written; see `sa_jax.train.folder.locked`.

    Raises:
      UserError: if the data differ from the checkpoint's, or more steps are done than the run has.
    """
    self._config, self._run, self._checkpoints, self._check_ours = config, run, checkpoints, check_ours
    self._data = run.batches()
    self.done, self.window = 0, Window()
    self.eval_loss: float | None = None
    if checkpoints.latest is None:
      self.state = run.make_state()
    else:
      self.done, self.state, extra = checkpoints.restore(run.abstract_state(), _check_extra)
      self.window, self.eval_loss = Window(**extra["window"]), extra["eval_loss"]
      if (extra["rows"], extra["checksum"]) != run.identity:
        raise UserError(
          f"the training data have changed since {config.out} was started ({extra['rows']} rows then, "
          f"{run.identity[0]} now); use a new folder (`out`), or restore the data"
        )
      if self.done > config.steps:
        raise UserError(f"{config.out} has already done {self.done} steps; it cannot end at step {config.steps}")
      self._data.set_state(extra["data"])
    self._write: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    self._unseen: tuple[int, Metrics] | None = None
    self._profile_folder: Mirrored | None = None
    self._first = self.done + 1
    self._clock = Clock()
    self._rate = schedule(config.optimizer, config.steps)
    self._rate_at(0)  # Compile now, so that this does not slow the first line of metrics.
    flops = train_flops(run.model.config, run.model.plan, config.batch_size, config.data.length)
    peak = peak_tflops(config.log.peak_tflops)
    self._mfu_seconds = flops / (peak * 1e12 * jax.device_count()) if peak else None

  def run(self, write: Callable[[int, Mapping[str, float]], None], advance: Callable[[int], None]) -> bool:
    """Trains to the last step; returns whether a stop request ended that early. In both cases the state is saved.

    Args:
      write: called with a step's metrics.
      advance: called after each step.
    """
    self._write = write
    config, log = self._config, self._config.log
    with Interruption(log.minutes) as interruption:
      self._export()
      while self.done < config.steps:
        self._profile(starting=True)
        self._step()
        last = self.done == config.steps
        stop = interruption.requested(self.done) and not last
        self._profile(starting=False, stopping=stop)
        if self._run.eval_rows is not None and (last or self.done % log.eval_every == 0):
          self._evaluate()
        if last or stop or self.done % log.save_every == 0:
          self._save()
        self._export()
        self._checkpoints.check()
        advance(self.done)
        if stop:
          return True
    return False

  def _step(self) -> None:
    """Starts a step, and checks the previous one while the device computes.

    Before a line of metrics all steps are finished, so that the line times exactly its own steps.
    """
    batch = to_devices(next(self._data), self._run.batch_sharding, self._config.batch_size)
    self.state, metrics = self._run.remat.step(self.state, self._run.frozen, batch)
    self.done += 1
    self._look()
    self._unseen = self.done, metrics
    if self.done == self._first or self._is_due(self.done):
      self._look()

  def _is_due(self, step: int) -> bool:
    return step % self._config.log.log_every == 0 or step == self._config.steps

  def _look(self) -> None:
    """Waits for the last unchecked step, counts it, and writes a line of metrics if one is due.

    Raises:
      UserError: after too many consecutive non-finite steps.
    """
    if self._unseen is None:
      return
    step, metrics = self._unseen
    self._unseen = None
    metrics = jax.device_get(metrics)
    loss, norm, weight, finite = map(float, (metrics.loss, metrics.grad_norm, metrics.weight, metrics.finite))
    self.window.add(loss, weight, bool(finite))
    self._clock.tick()
    if self.window.in_row >= self._config.max_skipped:
      latest = self._checkpoints.latest
      raise UserError(
        f"loss or gradient were not finite in {self.window.in_row} steps in a row, up to step {step} (loss {loss}, "
        f"gradient norm {norm}); none changed the parameters. "
        + ("There is no checkpoint yet" if latest is None else f"The last checkpoint is of step {latest}")
        + ". Check the data, or lower `learning_rate`"
      )
    if self._is_due(step):
      self._write(step, self._line(step, norm) | of_routers(metrics.aux))

  def _line(self, step: int, norm: float) -> dict[str, float]:
    """The metrics of a step; tokens read are all slots of the rows, trained tokens those in the loss."""
    seconds = self._clock.lap()
    slots = self._config.batch_size * self._config.data.length
    values = {
      "loss": self.window.close(),
      "grad_norm": norm,
      "learning_rate": self._rate_at(max(step - 1 - self.window.skipped, 0)),
      "tokens_trained": self.window.seen,
      "tokens_read": float(step * slots),
    }
    if self.window.skipped:
      values["skipped"] = self.window.skipped
    if seconds is not None:
      values["tokens_per_second"] = slots / seconds
      if self._mfu_seconds is not None:
        values["mfu"] = self._mfu_seconds / seconds
      values["seconds_left"] = (self._config.steps - step) * seconds
    return values

  def _rate_at(self, update: int) -> float:
    """The learning rate of an update, counted from 0."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, which the caller may have disallowed
      return float(self._rate(update))

  def _evaluate(self) -> None:
    """Loss and perplexity on the evaluation data."""
    self._look()
    began = time.perf_counter()
    run, config = self._run, self._config
    assert run.eval_rows is not None
    batches = every_row_once(run.eval_rows, config.batch_size, run.mine, config.log.eval_batches)
    placed = (to_devices(batch, run.batch_sharding, config.batch_size) for batch in batches)
    # one batch on the devices at a time
    sums = [jax.device_get(run.evaluate(self.state.params, run.frozen, batch)) for batch in placed]
    total, weight = np.asarray(sums, np.float64).sum(axis=0)
    self.eval_loss = float(total / weight)
    perplexity = math.exp(min(self.eval_loss, 700.0))
    self._write(self.done, {"eval_loss": self.eval_loss, "eval_perplexity": perplexity})
    self._clock.pause(time.perf_counter() - began)

  def _export(self) -> None:
    """Writes the model of this step, if one is due and a previous run has not written it."""
    every, path = self._config.log.export_every, self._config.out / "models" / str(self.done)
    if every is not None and self.done % every == 0 and is_missing(path):
      began = time.perf_counter()
      self._run.export(self.state.params, path)
      self._clock.pause(time.perf_counter() - began)

  def _save(self) -> None:
    self._look()
    self._check_ours()
    began = time.perf_counter()
    extra = {
      "data": self._data.get_state(),
      "rows": self._run.identity[0],
      "checksum": self._run.identity[1],
      "window": dataclasses.asdict(self.window),
      "eval_loss": self.eval_loss,
    }
    self._checkpoints.save(self.done, self.state, extra)
    self._clock.pause(time.perf_counter() - began)

  def _profile(self, *, starting: bool, stopping: bool = False) -> None:
    """Starts the profile before its first step, and stops it after the last one, or when the run stops."""
    first, last = self._config.log.profile or (0, 0)
    if starting and self._profile_folder is None and first <= self.done + 1 <= last:
      self._profile_folder = Mirrored(self._config.out / "profile")
      jax.profiler.start_trace(str(self._profile_folder.local))
    elif self._profile_folder is not None and not starting and (stopping or self.done >= min(last, self._config.steps)):
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self._profile_folder.close()
      self._profile_folder = None


def _check_extra(extra: dict[str, Any]) -> None:
  """Checks the JSON values of a checkpoint.

  Raises:
    UserError: if they are not what `Loop` saves.
  """
  kinds: dict[str, type] = {"data": dict, "rows": int, "checksum": int, "window": dict}
  wrong = [name for name, kind in kinds.items() if not isinstance(extra.get(name), kind)]
  known = {field.name for field in dataclasses.fields(Window)}
  if wrong or not set(extra["window"]) <= known or not isinstance(extra.get("eval_loss", 0), float | int | None):
    raise UserError(f"its metadata are damaged ({', '.join(wrong) or 'window, eval_loss'})")
