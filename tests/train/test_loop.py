"""The loop in this process: modes and methods, what is refused before anything compiles, what is not finite."""

import dataclasses
import datetime
import json
import shutil

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import SharingPlan, cli
from sa_jax.formats.checkpoint import save_checkpoint
from sa_jax.mesh import MeshSizes
from sa_jax.train import loop
from sa_jax.train.checkpoints import Checkpoints
from sa_jax.train.config import DistillConfig, LogConfig, LoraConfig, load_config
from sa_jax.train.data import byte_tokenizer
from sa_jax.train.learner import model_of
from sa_jax.train.loop import train
from sa_jax.train.metrics import Clock
from sa_jax.train.setup import prepare
from tests import tiny
from tests.train.tiny_run import SHAPE, config


def lines(out):
  return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """A small dense checkpoint with a byte tokenizer."""
  folder = tmp_path_factory.mktemp("dense") / "model"
  model = sa_jax.Transformer(dataclasses.replace(SHAPE, family="llama"), SharingPlan.dense(3))
  params = jax.tree.map(jax.numpy.asarray, tiny.params(model))
  save_checkpoint(folder, model.config, model.plan, params, byte_tokenizer().save)
  return folder


def from_dense(dense, out, **changes):
  """Two steps from the dense checkpoint on one text."""
  small = {"shape": None, "model": dense, "steps": 2, "log": LogConfig(log_every=1, tensorboard=False)}
  return config(out, **(small | changes))


def test_the_first_line_of_metrics_takes_no_time_from_the_steps_after_it(tmp_path, monkeypatch):
  """The learning rate's schedule has been compiled before the clock runs."""
  events = []
  tick, make = Clock.tick, loop.schedule

  def schedule(*given):
    made = make(*given)
    return lambda update: [events.append("rate"), made(update)][1]

  monkeypatch.setattr(loop, "schedule", schedule)
  monkeypatch.setattr(Clock, "tick", lambda clock: [events.append("tick"), tick(clock)])
  train(config(tmp_path / "run", steps=4, log=LogConfig(log_every=2, save_every=4, tensorboard=False)))
  assert events == ["rate", "tick", "tick", "rate", "tick", "tick", "rate"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "how",
  [
    {"mode": "distill", "method": "lora", "lora": LoraConfig(rank=2)},
    {
      "mode": "distill",
      "gradual_steps": 2,
      "distill": DistillConfig(hidden_weight=0.5),
      "log": LogConfig(log_every=1, tensorboard=False, export_every=2),
    },
  ],
  ids=["distilled adapters", "distilled gradually"],
)
def test_every_mode_ends_as_an_ordinary_checkpoint(dense, tmp_path, how):
  """It opens under its plan, pruned and merged, and its loss is what the run said at its end."""
  text = tmp_path / "eval.txt"
  text.write_text("Sentence 7 says 49, no more.")
  made = from_dense(dense, tmp_path / "run", **how)
  made = dataclasses.replace(made, data=dataclasses.replace(made.data, eval=(text,)))
  outcome = train(made)
  model, params = sa_jax.from_pretrained(outcome.model)
  assert str(model.plan) == "1:2"
  assert "q_proj" not in params["runs"]["1"]["followers"]["attention"]
  _, before = sa_jax.from_pretrained(dense, "1:2")
  for step, same in (("0", before), ("2", params)) if "log" in how else ():
    exported, kept = sa_jax.from_pretrained(tmp_path / "run" / "models" / step)
    assert exported == model
    tiny.assert_trees_equal(kept, same)
  moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)]
  assert max(moved) > 1e-3
  tokens = np.asarray([[*text.read_bytes(), 256]], np.int32)
  # Distilled from itself, with nothing shared yet, there is nothing to learn; unless it shares at once.
  assert (lines(tmp_path / "run")[0]["loss"] < 1e-6) == ("gradual_steps" in how)
  assert outcome.eval_loss == pytest.approx(sa_jax.perplexity(model, params, tokens).loss, abs=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "x", "preset": "y"}, "`model` and `preset` and `shape` each set"),
    ({"shape": None}, "give a checkpoint to start from"),
    ({"mode": "distill"}, "`mode=distill` needs a checkpoint"),
    ({"method": "lora"}, "`method=lora` needs a checkpoint"),
    ({"model": "x", "shape": None, "mode": "distill", "z_loss": 1.0}, "`z_loss` does not work with `mode=distill`"),
    ({"distill": DistillConfig(temperature=2.0)}, "`hidden_weight` only work with `mode=distill`"),
    ({"lora": LoraConfig(rank=2)}, "`rank`, `alpha` and `targets` only work with `method=lora`"),
    ({"gradual_steps": 2}, "`gradual_steps` needs a checkpoint"),
    ({"steps": 0, "batch_size": 0}, r"batch_size=0 \(must be at least 1\)\n  steps=0"),
  ],
)
def test_contradictions(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    config(tmp_path / "run", **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 12}, "a batch of 12 rows does not divide over 8 shards"),
    ({"batch_size": 16, "accumulate": 4}, "a batch of 4 rows does not divide over 8 shards"),
    ({"accumulate": 3}, "a batch of 8 rows does not divide into 3 parts"),
    ({"mesh": MeshSizes(tensor=3)}, "data 2 × fsdp 1 × tensor 3 needs 6 devices; there are 8"),
    ({"mesh": MeshSizes(sequence=8), "data": "length 30"}, "rows of 30 tokens do not divide over `sequence=8`"),
    (
      {"shape": dataclasses.replace(SHAPE, vocab_size=100)},
      "the tokenizer encodes .* token 256, .* vocabulary has 100",
    ),
    ({"plan": "2:3"}, "goes past the model"),
    ({"data": "no file"}, "name at least one file of training data"),
    ({"preset": "llama-9", "shape": None}, "no preset 'llama-9'"),
    ({"shape": dataclasses.replace(SHAPE, family="lama")}, "a config.json of the unknown family 'lama'.*llama"),
    (
      {"shape": dataclasses.replace(SHAPE, window=8, local_layers=(0,))},
      r"a llama config.json cannot describe this model: window=8 \(it has None\); local_layers=\(0,\)",
    ),
  ],
)
def test_what_does_not_fit_is_refused_before_compilation(tmp_path, monkeypatch, changes, message):
  monkeypatch.setattr("sa_jax.train.loop.Loop.__init__", lambda *_: pytest.fail("the loop began"))
  made = config(tmp_path / "run")
  replaced = {
    "no file": dataclasses.replace(made.data, train=()),
    "length 30": dataclasses.replace(made.data, length=30),
  }
  changes = {name: replaced.get(value, value) if name == "data" else value for name, value in changes.items()}
  with pytest.raises(ValueError, match=message):
    train(config(tmp_path / "run", **changes))


def test_steps_that_are_not_finite(dense, tmp_path):
  """They are counted and change nothing; too many in a row end the run, and its checkpoint stays."""
  model, params = sa_jax.from_pretrained(dense, layout="layers")
  params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(np.nan)
  broken = tmp_path / "broken"
  save_checkpoint(broken, model.config, model.plan, params, byte_tokenizer().save)
  made = from_dense(broken, tmp_path / "run", steps=9, max_skipped=4)
  with pytest.raises(
    ValueError, match=r"not finite in 4 steps in a row, up to step 4 .* The last checkpoint is of step"
  ):
    train(dataclasses.replace(made, log=dataclasses.replace(made.log, save_every=2)))
  kept = prepare(made)
  with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:
    _, state, _ = checkpoints.restore(kept.abstract_state())
  assert int(state.skipped) == int(state.step)
  np.testing.assert_array_equal(state.params["embed"]["embedding"], params["embed"]["embedding"])


FLAGS = ("--out", "x", "--preset", "smollm2-135m", "--train", "a.txt", "--steps", "3")


def test_a_model_from_scratch_ends_as_its_tokenizer_does(tmp_path):
  scratch = lambda **changes: model_of(config(tmp_path / "run", **changes), byte_tokenizer()).config
  made = scratch(shape=None, preset="smollm2-135m")
  assert (made.bos_token_id, made.eos_token_ids) == (None, (256,))
  assert scratch(shape=dataclasses.replace(SHAPE, eos_token_ids=(7,), bos_token_id=3)).eos_token_ids == (7,)


def test_an_empty_folder_is_no_finished_model(tmp_path):
  (tmp_path / "run" / "model").mkdir(parents=True)
  done = train(config(tmp_path / "run", steps=1))
  assert sa_jax.from_pretrained(done.model)[0].config.num_layers == SHAPE.num_layers


@pytest.mark.slow
def test_a_profile_is_written_where_the_run_stops(tmp_path):
  """Inside the window; the run that goes on records the rest of it."""
  made = config(tmp_path / "run", steps=3)
  stopped = dataclasses.replace(made, log=dataclasses.replace(made.log, profile=(1, 3), minutes=1e-9))
  profiles = lambda: len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb")))
  assert train(stopped).interrupted
  assert profiles() == 1
  assert not train(dataclasses.replace(stopped, log=dataclasses.replace(stopped.log, minutes=None))).interrupted
  assert profiles() == 2


DATED = (
  "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_run_keeps_its_date(dense, tmp_path, monkeypatch):
  """Stopped on one day and taken up on the next, a template that writes the date writes the first one."""
  model = tmp_path / "model"
  shutil.copytree(dense, model)
  (model / "chat_template.jinja").write_text(DATED)
  chats = tmp_path / "chats.jsonl"
  messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
  chats.write_text(json.dumps({"messages": messages}) + "\n")
  made = from_dense(model, tmp_path / "run", mode="sft", steps=3)
  made = dataclasses.replace(made, data=dataclasses.replace(made.data, train=(chats,)))

  def on(day: int, **changes) -> bool:
    class Clock(datetime.datetime):
      @classmethod
      def now(cls, tz=None):
        return cls(2025, 1, day, 12)

    monkeypatch.setattr("sa_jax.train.folder.datetime.datetime", Clock)
    return train(dataclasses.replace(made, log=dataclasses.replace(made.log, **changes))).interrupted

  assert on(1, minutes=1e-9)
  assert json.loads((made.out / "config.json").read_text())["date"] == "2025-01-01"
  assert not on(2)
  assert [line["step"] for line in lines(made.out)] == [1, 2, 3]
  with pytest.raises(ValueError, match="date is 2025-01-02, but 2025-01-01 there"):
    train(dataclasses.replace(made, date="2025-01-02"))


def test_a_date_that_is_none(tmp_path):
  with pytest.raises(ValueError, match=r"date='31 May' \(must be a day such as 2026-11-30\)"):
    config(tmp_path / "run", date="31 May")


def test_config_file_and_flags(tmp_path, monkeypatch, capsys):
  """The file's values are the flags' defaults; flags win; mistakes are one line and code 2."""
  seen = []
  file = tmp_path / "run.py"
  file.write_text(
    "from pathlib import Path\nfrom tests.train.tiny_run import config as make\n"
    f"config = make(Path({str(tmp_path / 'run')!r}), seed=5)\n"
  )
  monkeypatch.setattr("sa_jax.cli.train.Train.run", lambda self: seen.append(self.config))
  assert cli.main(["train", str(file), "--steps", "7", "--learning-rate", "0.5"]) == 0
  assert (seen[0].seed, seen[0].steps, seen[0].optimizer.learning_rate) == (5, 7, 0.5)
  assert seen[0].shape == SHAPE
  file.write_text("config = 3\n")
  assert cli.main(["train", str(file)]) == 2
  assert "must define a variable 'config'" in capsys.readouterr().err
  assert cli.main(["train", *FLAGS, str(file)]) == 2
  assert "a config file must end in .py and come before all flags" in capsys.readouterr().err
  file.write_text(
    "from __future__ import annotations\nimport dataclasses\nfrom pathlib import Path\n"
    "from tests.train.tiny_run import config as make\n\n@dataclasses.dataclass\nclass Mine:\n  seed: int = 9\n\n"
    f"config = make(Path({str(tmp_path / 'run')!r}), seed=Mine().seed)\n"
  )
  assert load_config(file).seed == 9
  assert cli.main(["train", "--out", "x"]) == 2
  assert "give a checkpoint to start from (--model)" in " ".join(capsys.readouterr().err.split())
  file.write_text("1 / 0\n")
  with pytest.raises(ValueError, match="run.py fails: ZeroDivisionError"):
    load_config(file)
