"""A run's folder: who may train in it, what stands in the way of whom, how a run goes on and is extended."""

import dataclasses
import io
import json
import logging
import shutil
import time

import pytest
from rich.console import Console

import sa_jax
from sa_jax import UserError
from sa_jax.train import setup
from sa_jax.train.config import LogConfig
from sa_jax.train.folder import checked, claim, locked, make_room
from sa_jax.train.loop import train
from sa_jax.train.optimizer import OptimizerConfig
from tests.train.tiny_run import config

SLEEP = 0.25
CONSTANT = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant")


def test_missing_data_are_told_before_the_folder_is_looked_at(tmp_path):
  """Even where the folder holds another run, which other data would be a part of."""
  out = tmp_path / "run"
  with locked(out):
    claim(checked(config(out)))
  saved(out, 4)
  data = dataclasses.replace(config(out).data, train=("gone.txt",), eval=["here/gone.txt"])
  with pytest.raises(UserError, match=r"^there is no file gone.txt, here/gone.txt$"):
    train(config(out, data=data))


def lines(out):
  return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved(out, step: int) -> None:
  """As if a checkpoint had been written."""
  (out / "checkpoints" / str(step) / "state").mkdir(parents=True)


def test_a_start_that_failed_stands_in_nobody_s_way(tmp_path):
  """Its config and what it exported of step 0 give way; once something is saved, they do not."""
  out = tmp_path / "run"
  first, second = config(out, date="2025-01-01"), config(out, batch_size=16)
  with locked(out):
    claim(checked(first))
  (out / "models" / "0").mkdir(parents=True)
  (out / "checkpoints" / "3").mkdir(parents=True)  # an empty folder is no checkpoint
  (out / "model").mkdir()  # nor a model
  found = checked(second)
  assert found.date != "2025-01-01"
  claim(found)
  assert not (out / "models").exists()
  saved(out, 4)
  assert checked(second).date == found.date
  with pytest.raises(UserError, match=r"(?s)holds a different run; .*batch_size is 8, but 16 there"):
    checked(first)


@pytest.mark.parametrize("contents", ["[1]", "{", "[" * 100_000])
def test_a_config_that_is_damaged(tmp_path, contents):
  out = tmp_path / "run"
  saved(out, 4)
  (out / "config.json").write_text(contents)
  with pytest.raises(UserError, match=r"config.json (is not readable JSON|must contain a JSON object)"):
    checked(config(out))


def test_two_starts_of_one_run(tmp_path):
  """The second is told so, at once, and changes nothing; the lock goes with the first."""
  made = config(tmp_path / "run")
  began = time.monotonic()
  with locked(made.out), pytest.raises(UserError, match="another process trains in .*run; wait for its end"):
    train(made)
  assert time.monotonic() - began < 5
  assert [path.name for path in made.out.iterdir()] == [".lock"]
  with locked(made.out):
    pass


def test_a_run_whose_learning_rate_falls_cannot_be_extended(tmp_path):
  out = tmp_path / "run"
  with locked(out):
    claim(checked(config(out)))
  saved(out, 20)
  with pytest.raises(UserError, match=r"a run of 20 steps .* decays, so it cannot be extended to 30"):
    checked(config(out, steps=30))


def test_what_is_in_the_way_of_a_model(tmp_path):
  (tmp_path / "model").mkdir()
  assert make_room(tmp_path, 3) is None
  assert not (tmp_path / "model").exists()
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="is in the way of the trained model"):
    make_room(tmp_path, 3)
  (tmp_path / "model" / "params").mkdir()
  assert make_room(tmp_path, 3) == f"the model of step 3 is now {tmp_path / 'models' / '3'}"


def test_a_damaged_checkpoint_and_more_steps(tmp_path, monkeypatch, caplog):
  """The one before it is used, and said; a finished run with a constant rate goes on; all that the screen says."""
  steps = setup.make_step

  def slow(*given, **named):
    step = steps(*given, **named)

    def sleeping(*arguments):
      time.sleep(SLEEP)
      return step(*arguments)

    return sleeping

  monkeypatch.setattr(setup, "make_step", slow)
  out = tmp_path / "run"
  log = LogConfig(log_every=1, save_every=2, tensorboard=False, peak_tflops=1.0)
  made = config(out, steps=4, optimizer=CONSTANT, log=log)
  screen, said = io.StringIO(), []
  console = Console(file=screen, width=200)
  train(made, say=said.append, console=console)
  echo = next(text for text in said if text.startswith("devices"))
  for expected in ("8 × cpu", "data 8", "0.01 M are trained (full), pretrain", "1:2: 1 of 3 layers follow", str(out)):
    assert expected in echo
  assert "8 rows of 32 tokens, 256 tokens" in echo
  assert screen.getvalue().splitlines()[3].startswith("step 4/4  loss ")
  found = lines(out)
  assert [line["learning_rate"] for line in found] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])
  assert [line["tokens_read"] for line in found] == [256, 512, 768, 1024]
  assert all(line["tokens_trained"] < line["tokens_read"] for line in found)
  assert "tokens_per_second" not in found[0]  # it compiles
  for line in found[1:]:  # of every line, the time of its own step: never less than that takes
    assert 0.05 < line["tokens_per_second"] * SLEEP / 256 <= 1
    assert line["mfu"] > 0
    assert line["seconds_left"] >= (4 - line["step"]) * SLEEP

  (out / "checkpoints" / "4" / "extra" / "metadata").write_text('{"window": 3}')
  (out / "checkpoints" / "3").mkdir()
  shutil.rmtree(out / "model")
  with caplog.at_level(logging.WARNING):
    assert train(dataclasses.replace(made, steps=4), say=said.append, console=console).step == 4
  assert f"resuming after step 2 from {out}" in said
  assert "the checkpoint of step 4 cannot be read" in caplog.text
  assert "its metadata are damaged (data, rows, checksum, window)" in caplog.text
  assert "the last complete one is of step 2; using that of step 2" in caplog.text
  assert [path.name for path in (out / "checkpoints-damaged").iterdir()] == ["4"]
  again = lines(out)
  assert [line["loss"] for line in again] == [line["loss"] for line in found]

  said.clear()
  assert train(dataclasses.replace(made, steps=4), say=said.append, console=console).step == 4
  assert (
    f"{out} has already done its 4 steps, so nothing is trained; to train on, repeat the command with more steps"
    in (said)
  )
  assert not any("resuming" in line for line in said)
  with pytest.raises(UserError, match="has already done 4 steps; it cannot end at step 3"):
    train(dataclasses.replace(made, steps=3))
  taken = []

  class Mine:
    def write(self, step, values):
      taken.append(step)

    def close(self):
      taken.append("closed")

  outcome = train(dataclasses.replace(made, steps=5), say=said.append, writers=[Mine()], console=console)
  assert (outcome.step, taken) == (5, [5, "closed"])
  assert f"the model of step 4 is now {out / 'models' / '4'}" in said
  sa_jax.from_pretrained(out / "models" / "4")
  sa_jax.from_pretrained(outcome.model)


def test_a_source_and_its_resume(tmp_path):
  """Rows of examples; stopped and taken up, the losses are those of a run that nothing stopped."""
  texts = [{"text": f"Sentence {number} says {number * 7 % 97}."} for number in range(200)]
  plain = config(tmp_path / "whole", steps=3)
  whole = dataclasses.replace(plain, data=dataclasses.replace(plain.data, train=()))
  train(whole, texts)
  stopped = dataclasses.replace(whole, out=tmp_path / "run", log=dataclasses.replace(whole.log, minutes=1e-9))
  assert train(stopped, texts).interrupted
  train(dataclasses.replace(whole, out=tmp_path / "run"), texts)
  losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "run")]
  assert len(losses[0]) == 3
  assert losses[0] == losses[1]


def test_data_come_from_one_place(tmp_path):
  with pytest.raises(UserError, match="give training data in one way: .*not train and source"):
    train(config(tmp_path / "run"), ["a"])


def test_what_a_run_is_likely_not_meant_to_do_is_told(tmp_path):
  made = config(tmp_path / "run", steps=20, batch_size=32)
  assert setup.cautions(dataclasses.replace(made, optimizer=OptimizerConfig(warmup_steps=2)), 200) == []
  assert setup.cautions(dataclasses.replace(made, steps=50), 0) == []  # a stream
  few, large, warmup = setup.cautions(dataclasses.replace(made, optimizer=OptimizerConfig(warmup_steps=100)), 12)
  assert few.startswith("20 steps of 32 rows are 53.3 epochs of 12 rows: more than 4 usually overfit")
  assert large.startswith("a batch of 32 rows is larger than the data (12 rows)")
  assert warmup.startswith("the warm-up of 100 steps is longer than the run (20 steps): it is shortened")
  constant = OptimizerConfig(warmup_steps=100, schedule="constant")
  assert "only reaches 20% of its value" in setup.cautions(dataclasses.replace(made, optimizer=constant), 0)[0]
  assert "are 1,140 epochs of 12 rows" in setup.cautions(dataclasses.replace(made, steps=1140, batch_size=12), 12)[0]
