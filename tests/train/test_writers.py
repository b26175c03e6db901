"""Where a run's metrics go."""

import io
import json
import math
import sys
import types

import pytest
from rich.console import Console

from sa_jax import UserError
from sa_jax.durations import duration
from sa_jax.train.writers import JsonLines, Screen, TensorBoard, WeightsAndBiases, closing


def read(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_come_again(tmp_path):
  """On resuming, later lines go, and one that a kill left unfinished; numbers that are not finite are null."""
  with closing([JsonLines(tmp_path, 0)]) as write:
    for step in range(1, 5):
      write(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')
  said = []
  with closing([JsonLines(tmp_path, 2, said.append)]) as write:
    write(3, {"loss": math.nan})
  assert read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
  assert said == []


def test_damaged_lines_are_left_out_and_told(tmp_path):
  good = b'{"step": 1, "loss": 2.0}\n'
  bad = [b"5", b"{}", b'{"step": null}', b'{"step": "1"}', b"\xff\xfe\x00", b"[" * 100_000, b'{"step": 1']
  (tmp_path / "metrics.jsonl").write_bytes(good + b"\n".join(bad) + b"\n" + good)
  said = []
  JsonLines(tmp_path, 9, said.append).close()
  assert read(tmp_path) == [{"step": 1, "loss": 2.0}] * 2
  assert said == [f"{tmp_path / 'metrics.jsonl'}: 7 damaged lines left out"]


def test_tensorboard(tmp_path):
  """The values, as TensorBoard's own record format holds them."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  with closing([TensorBoard(tmp_path, 0)]) as write:
    write(3, {"loss": 1.5})
  (file,) = (tmp_path / "tensorboard").iterdir()
  found, contents = [], file.read_bytes()
  while contents:
    size = int.from_bytes(contents[:8], "little")
    assert masked_crc32c(contents[:8]) == int.from_bytes(contents[8:12], "little")
    event = Event.FromString(contents[12 : 12 + size])
    found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    contents = contents[16 + size :]
  assert found == [(3, "loss", 1.5)]


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
    JsonLines(tmp_path, 0)


def test_weights_and_biases(tmp_path, monkeypatch):
  """The package is asked once for a run, and for the same one when the folder is resumed."""
  asked, logged, ended = [], [], []

  class Run:
    id = "run-7"

    def log(self, values, step):
      logged.append((step, values))

    def finish(self):
      ended.append(True)

  def init(**given):
    asked.append(given)
    return Run()

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  for step in (1, 2):
    with closing([WeightsAndBiases(tmp_path, "ours", {"steps": 9})]) as write:
      write(step, {"loss": 0.5})
  assert [given["id"] for given in asked] == [None, "run-7"]
  assert asked[0] | {"id": None} == {
    "project": "ours", "name": tmp_path.name, "dir": str(tmp_path), "id": None, "resume": "allow",
    "config": {"steps": 9},
  }  # fmt: skip
  assert logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
  assert ended == [True, True]
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"Weights & Biases needs its package .*pip install 'sa-jax\[wandb\]'"):
    WeightsAndBiases(tmp_path, "ours", {})


LINE = {"loss": 2.5, "learning_rate": 3e-4, "tokens_per_second": 12345.6, "seconds_left": 180.0, "tokens_read": 7.0}
SAID = "step 2/9  loss 2.5000  learning rate 0.0003  12,346 tokens/s  3 min left"


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_stay_on_the_screen(terminal):
  """In a terminal as in a pipe; the bar of a terminal goes, its lines do not, nor does what others write there."""
  out = io.StringIO()
  console = Console(file=out, force_terminal=terminal, width=60, highlight=False)
  screen = Screen(console, 9, 0)
  with closing([screen]) as write:
    screen.advance(2)
    console.print("said by another")
    write(2, LINE)
  assert "said by another" in out.getvalue()
  # A terminal's lines end between words, a file's where they end.
  whole = " ".join(out.getvalue().split())
  assert " ".join(SAID.split()) in whole if terminal else SAID in out.getvalue()
  if not terminal:
    assert out.getvalue() == f"said by another\n{SAID}\n"


def test_all_writers_are_closed_when_one_fails():
  closed = []

  class Mine:
    def __init__(self, name):
      self.name = name

    def write(self, step, values):
      raise OSError(self.name)

    def close(self):
      closed.append(self.name)

  with pytest.raises(OSError, match="first"), closing([Mine("first"), Mine("second")]) as write:
    write(1, {})
  assert sorted(closed) == ["first", "second"]


def test_durations():
  assert [duration(seconds) for seconds in (3, 89, 90, 3599, 3600, 90_000)] == [
    "3 s", "89 s", "2 min", "1 h 00 min", "1 h 00 min", "25 h 00 min",
  ]  # fmt: skip
