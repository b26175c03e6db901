"""Measurements: what is counted and how it is told; times themselves are not tested."""

import dataclasses
import json

import pytest

from sa_jax import UserError
from sa_jax.bench import Result, Task, Timing, run_task, timed
from sa_jax.cli import main
from sa_jax.cli.bench import _row

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
  ("arguments", "why"),
  [
    (["decode", "--attention", "flash"], "attention (decode does not use it; it is for prefill, train, step)"),
    (["train", "--cache-dtype", "int8"], "--cache-dtype (train does not use it; it is for decode, batching)"),
    (["prefill", "--remat", "dots"], "remat (prefill does not use it; it is for step, train)"),
    (["batching", "--length", "64"], "--length 64 (must be at least 575 slots, for the longest request)"),
    (["batching", "--requests", "3", "--batch-size", "2"], "3 requests (must be a multiple of --batch-size 2"),
    (["decode", "--length", "128", "--peers", "hf-eager"], "--length 128 (must be at least 192 for peers)"),
    (["decode", "--layers", "0"], "--layers 0 (must be at least 1)"),
    (["decode", "--plan", "31:32"], "goes past the model"),
  ],
)
def test_what_means_nothing_is_refused(capsys, arguments, why):
  assert main(["bench", *arguments]) == 2
  assert why in " ".join(capsys.readouterr().err.split())


def test_rows_of_the_table_say_what_sets_them_apart():
  told = lambda **how: _row(Result(Task("step", "tiny", "0:1-2", **how), 0.5, 0.4, 0.6, 1.0, 0.0, "a card"))[0]
  assert told() == "0:1-2"
  assert told(attention_state="attention_weights") == "0:1-2 attention_weights"
  assert told(group_backward=True) == "0:1-2, one backward pass per group"


def test_what_was_measured_is_told_though_the_next_fails(monkeypatch, capsys, tmp_path):
  def measured(task):
    if task.length == 64:
      raise UserError("out of memory")
    return Result(task, 0.5, 0.4, 0.6, work=8e9, ceiling=20e9, device="a card")

  monkeypatch.setattr("sa_jax.cli.bench.run_task", measured)
  assert main(["bench", "decode", "--length", "32", "64", "--json", str(tmp_path / "out.json")]) == 2
  said = capsys.readouterr()
  assert "500.00" in said.out
  assert "out of memory" in said.err
  assert json.loads((tmp_path / "out.json").read_text())[0]["task"]["length"] == 32


def test_curves_are_of_decode_and_of_the_model_that_was_measured(tmp_path, monkeypatch):
  from sa_jax import SharingPlan, cost
  from sa_jax.bench import plot

  drawn = []
  monkeypatch.setattr(plot, "new_figure", lambda *_: Canvas(drawn))
  task = Task("decode", "llama-2-7b", layers=4, length=64, cache_dtype="int8")
  results = [
    Result(each, 0.5, 0.4, 0.6, 1, 1, "a card")
    for each in (task, dataclasses.replace(task, who="hf-eager", length=256))
  ]
  plot.decode_curves(results, tmp_path / "curves.png")
  assert drawn == [([64], [500.0]), ([64], [cost(task.config, SharingPlan.dense(4), 1, 64).kv_cache_bytes / 1e9])]
  with pytest.raises(ValueError, match="these curves need decode results, not train"):
    plot.decode_curves([Result(Task("train", "llama-2-7b"), 0.5, 0.4, 0.6, 1, 1, "a card")], tmp_path / "x.png")


class Canvas:
  """What `decode_curves` draws on: keeps the lines' points."""

  def __init__(self, drawn):
    self.drawn = drawn

  def subplots(self, *_):
    return self, self

  def plot(self, x, y, **_):
    self.drawn.append((x, y))

  def savefig(self, file, **_):
    file.touch()

  def __getattr__(self, _):
    return lambda *_, **__: None


@pytest.mark.parametrize(
  ("kind", "filled", "why"),
  [
    ("decode", "2048", r"bench: 2048 filled slots of 1024 \(must be 32, the steps of a call, to all\)"),
    ("decode", "16", "bench: 16 filled slots of 1024"),
    ("train", "16", "bench: filled (train does not use it; it is for decode)"),
  ],
)
def test_slots_that_cannot_be_filled_are_refused(capsys, kind, filled, why):
  assert main(["bench", kind, "--filled", filled]) == 2
  assert why.replace("\\", "") in " ".join(capsys.readouterr().err.split())


def test_a_plot_is_of_full_caches(capsys):
  assert main(["bench", "decode", "--filled", "64", "--plot", "x.png"]) == 2
  assert "--plot needs full caches: leave out --filled" in capsys.readouterr().err


def test_a_cache_may_have_more_slots_than_tokens(monkeypatch):
  from sa_jax import cost
  from sa_jax.bench import ours
  from sa_jax.config import PRESETS
  from tests import tiny

  monkeypatch.setitem(PRESETS, "tiny", tiny.config())
  monkeypatch.setattr(ours, "copy_bandwidth", lambda **_: 1e9)
  result = ours.decode(Task("decode", "tiny", "0:1", batch_size=2, length=96, filled=48, layers=2, repeats=1))
  assert result.work == cost(tiny.config(num_layers=2), "0:1", 2, 48 - 31 // 2).decode_bytes
  assert (
    result.detail == f"cache {2 * 3 * 96 * 2 * tiny.config().num_kv_heads * tiny.config().head_dim * 4 / 1e9:.2f} GB"
  )


def test_peers_are_refused_where_there_are_none(capsys):
  assert main(["bench", "batching", "--peers", "hf-compiled"]) == 2
  assert "--peers works with decode, prefill, train and step, not with batching" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the newer name is not in every transformers 5
@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_a_peer_does_the_work_of_the_same_layers(monkeypatch, kind):
  torch = pytest.importorskip("torch")
  from sa_jax.bench import ours, peers
  from sa_jax.config import PRESETS
  from tests import tiny

  monkeypatch.setitem(PRESETS, "tiny", tiny.config(num_layers=2))
  monkeypatch.setattr(peers, "_DEVICE", "cpu")
  for name, answer in {"synchronize": None, "max_memory_allocated": 0, "get_device_name": "a card"}.items():
    monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
  monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: None)
  task = Task(kind, "tiny", length=8, batch_size=2, repeats=1, who="hf-eager")
  result = getattr(peers, kind)(task)
  assert result.work == getattr(ours, kind)(dataclasses.replace(task, who="sa_jax")).work
  assert result.low == result.seconds > 0


def test_a_train_step_is_measured(monkeypatch):
  from sa_jax import ModelConfig, cost
  from sa_jax.bench import ours
  from sa_jax.config import PRESETS
  from tests import tiny

  monkeypatch.setitem(PRESETS, "tiny", tiny.config())
  result = ours.step(Task("step", "tiny", "0:1", batch_size=2, length=8, layers=2, repeats=2))
  assert result.work == 3 * cost(ModelConfig.preset("tiny", num_layers=2), "0:1", 2, 8).flops
  assert result.low <= result.seconds <= result.high
  assert "tokens/s, MFU" in result.detail
  assert result.temp_bytes > 0


@pytest.mark.parametrize("state", ["query_key", "attention_weights"])
def test_a_stack_of_layers_is_measured(monkeypatch, state):
  """Its FLOPs are those of multiplying by each matrix and of attention, three times as many with the gradient."""
  from sa_jax.bench import ours
  from sa_jax.config import PRESETS
  from tests import tiny

  config = tiny.config()
  monkeypatch.setitem(PRESETS, "tiny", config)
  task = Task("train", "tiny", "0:1", batch_size=2, length=8, layers=2, repeats=2, attention_state=state)
  result = ours.train(task)
  queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  followers = config.embed_dim * (keys + queries + 3 * config.mlp_dim)
  anchor = followers + config.embed_dim * (queries + keys)
  forward = ours.prefill(dataclasses.replace(task, kind="prefill")).work
  assert result.work == 3 * forward
  attention = forward - 2 * (2 * 8) * (anchor + followers)
  # q·k in the anchor and weights·v in both, over the causal half.
  assert attention == 3 * 2 * 2 * queries * 8 * 9 // 2
  assert result.temp_bytes > 0
