"""Killed, stopped, out of disk: what is on disk is whole, and the run goes on as if nothing had happened."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sa_jax
from sa_jax.train.loop import train
from tests import FAST_COMPILATION
from tests.tiny import assert_trees_equal
from tests.train.tiny_run import SAVE_EVERY, STEPS, config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("SA_JAX_KILLS", "2"))
"""How often a run is killed, each time at a random step or moment of a checkpoint."""


def curve(out: Path) -> list[tuple[int, float, float]]:
  lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def child(tmp_path_factory):
  """Runs `tests.train.tiny_run` on one device, and what it compiles is kept for the next."""
  here = {
    "XLA_FLAGS": FAST_COMPILATION,
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.train.tiny_run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | here, capture_output=True, text=True)

  return run


@pytest.fixture(scope="module")
def whole(child, tmp_path_factory):
  """A run that nothing interrupts."""
  out = tmp_path_factory.mktemp("whole") / "run"
  ended = child(out)
  assert ended.returncode == 0, ended.stderr
  return out


def assert_same(out: Path, whole: Path) -> None:
  assert curve(out) == curve(whole)
  opened = [sa_jax.from_pretrained(folder / "model")[1] for folder in (out, whole)]
  assert_trees_equal(*opened)


def test_the_run_learns_and_its_model_opens(whole):
  losses = [loss for _, loss, _ in curve(whole)]
  assert [step for step, _, _ in curve(whole)] == list(range(1, STEPS + 1))
  assert losses[-1] < losses[0] - 1
  model, params = sa_jax.from_pretrained(whole / "model")
  assert str(model.plan) == "1:2"
  tokenizer = sa_jax.load_tokenizer(whole / "model")
  tokens = np.asarray([tokenizer.encode("Sentence 7 says 49 and then")], np.int32)
  assert sa_jax.perplexity(model, params, tokens).loss < losses[0] - 1


def test_killed(child, whole, tmp_path):
  """SIGKILL at random steps and in the middle of checkpoints: the same losses, parameters and order of data."""
  choose = random.Random(os.environ.get("SA_JAX_KILL_SEED", "0"))
  out, done = tmp_path / "run", 0
  for kill in range(KILLS):
    lowest = done + 1
    if kill % 2:
      step = min(STEPS - SAVE_EVERY, (lowest // SAVE_EVERY + 1) * SAVE_EVERY)
      event = ("save", step, round(choose.uniform(0, 0.05), 3))
    else:
      event = ("kill", choose.randint(lowest, min(lowest + 2 * SAVE_EVERY, STEPS - 1)))
    assert child(out, *event).returncode == -9, event
    found = [int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit()]
    done = max(found, default=0)
    if done >= STEPS - 2 * SAVE_EVERY:
      done = 0
      (out / "checkpoints").rename(tmp_path / f"checkpoints-{kill}")  # and from the beginning
  assert child(out).returncode == 0
  assert_same(out, whole)


def test_stopped_and_out_of_disk(child, whole, tmp_path):
  """SIGTERM loses no step. Files that cannot grow: one clear sentence, the checkpoint before is whole."""
  out = tmp_path / "run"
  assert child(out, "stop", 7).returncode == 143
  assert (out / "checkpoints" / "7").is_dir()
  assert curve(out) == curve(whole)[:7]
  ended = child(out, "full", 8)
  assert ended.returncode == 1
  assert "the checkpoint" in ended.stderr
  assert "in " + str(out / "checkpoints") in ended.stderr
  assert "File too large; the last complete one is of step 7" in ended.stderr
  assert child(out).returncode == 0
  assert_same(out, whole)


def test_unwritable_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot write to .*file/run: Not a directory"):
    train(dataclasses.replace(config(tmp_path / "run"), out=tmp_path / "file" / "run"))
  out = tmp_path / "run"
  out.mkdir()
  (out / "checkpoints").write_text("")
  with pytest.raises(ValueError, match=r"cannot be opened in .*run/checkpoints.*there is no earlier one"):
    train(config(out))


def test_another_run_in_the_folder(whole):
  with pytest.raises(ValueError, match=r"holds a different run; use a new folder .*: batch_size is 16, but 8 there"):
    train(config(whole, batch_size=16))


def test_checkpoints_of_a_run_that_nothing_tells_of(whole):
  kept = (whole / "config.json").rename(whole / "kept.json")
  with pytest.raises(ValueError, match=r"has checkpoints but no config\.json for their run"):
    train(config(whole))
  kept.rename(whole / "config.json")


def test_other_data_under_the_same_name(whole):
  text = whole.parent / "text.txt"
  before = text.read_text()
  # More rows, and as many of other words.
  for changed in (before + "\n\nOne more sentence, which makes one more row." * 9, before.replace("says", "said")):
    text.write_text(changed)
    with pytest.raises(ValueError, match="the training data have changed"):
      train(config(whole))
  text.write_text(before)


def test_finished_run_is_left_alone(whole):
  before = (whole / "metrics.jsonl").read_bytes()
  assert train(config(whole)).step == STEPS
  assert (whole / "metrics.jsonl").read_bytes() == before


def test_retention(whole):
  kept = sorted(int(path.name) for path in (whole / "checkpoints").iterdir() if path.name.isdigit())
  assert kept == [STEPS - SAVE_EVERY, STEPS]
