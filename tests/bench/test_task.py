"""Measurements: what is counted and how it is told; times themselves are not tested."""

import pytest

from sa_jax.bench import Result, Task, Timing, run_task, timed
from sa_jax.cli import main


def test_rate_and_share():
  result = Result(Task("decode", "llama-2-7b"), 0.5, 0.4, 0.6, work=8e9, ceiling=20e9, device="a card")
  assert (result.rate, result.share) == (16e9, 0.8)
  assert Result(Task("batching", "llama-2-7b"), 0.5, 0.4, 0.6, 8, 0.0, "a card").share is None


def test_timed_leaves_the_first_calls_out():
  calls = []
  timing = timed(lambda: calls.append(0), repeats=5, warmup=3)
  assert len(calls) == 8
  assert timing.low <= timing.median <= timing.high
  assert Timing(2.0, 1.0, 3.0).scaled(0.5) == (1.0, 0.5, 1.5)


def test_a_task_that_fails_says_why():
  with pytest.raises(ValueError, match="no preset 'no-such-model'; there are"):
    run_task(Task("decode", "no-such-model"))


def test_peers_are_refused_where_there_are_none(capsys):
  assert main(["bench", "prefill", "--peers", "hf-compiled"]) == 2
  assert "peers are timed in decode, train and step, not in prefill" in capsys.readouterr().err


def test_a_train_step_is_measured(monkeypatch):
  from sa_jax import ModelConfig, cost
  from sa_jax.bench import ours
  from sa_jax.config import PRESETS
  from tests import tiny

  monkeypatch.setitem(PRESETS, "tiny", tiny.config())
  result = ours.step(Task("step", "tiny", "0:1", batch=2, seq_len=8, layers=2, repeats=2))
  assert result.work == 3 * cost(ModelConfig.preset("tiny", num_layers=2), "0:1", 2, 8).flops
  assert result.low <= result.seconds <= result.high
  assert "tokens/s, MFU" in result.detail
  assert result.temp_bytes > 0
