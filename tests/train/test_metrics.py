"""What a run says of itself."""

import json
import math

import pytest

from sa_jax import ModelConfig, SharingPlan
from sa_jax.train import metrics
from sa_jax.train.metrics import Clock, Recorder, Window


def read(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_come_again(tmp_path):
  """On resuming, later lines go, and one that a kill left unfinished; numbers that are not finite are null."""
  with Recorder(tmp_path, 9, 0, tensorboard=False) as recorder:
    for step in range(1, 5):
      recorder.write(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')
  with Recorder(tmp_path, 9, 2, tensorboard=False) as recorder:
    recorder.write(3, {"loss": math.nan})
  assert read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]


def test_tensorboard(tmp_path):
  """The values, as TensorBoard's own record format holds them."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  with Recorder(tmp_path, 9, 0) as recorder:
    recorder.write(3, {"loss": 1.5})
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
  with pytest.raises(ValueError, match=r"cannot write .*metrics.jsonl"):
    Recorder(tmp_path, 9, 0, tensorboard=False)


def test_window():
  window = Window()
  for loss, weight, finite in ((1.0, 2.0, True), (math.nan, 2.0, False), (4.0, 4.0, True)):
    window.add(loss, weight, finite)
  assert (window.close(), window.seen, window.skipped, window.in_row) == (3.0, 6.0, 1, 0)
  assert math.isnan(window.close())


def test_clock_leaves_out_compilation_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = Clock()
  for passed in (100.0, 1.0, 1.0):
    now[0] += passed
    clock.tick()
  now[0] += 50.0
  clock.pause(50.0)
  assert clock.lap() == 1.0
  assert clock.lap() is None


def test_flops_by_hand():
  """Of one layer: a token costs 6 a parameter of matrices and head; a pair that sees each other, 6 H a head, twice."""
  config = ModelConfig(
    vocab_size=11, embed_dim=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=5, tie_embeddings=True
  )
  matrices = 4 * (2 + 1 + 1 + 2) * 2 + 3 * 4 * 5
  pairs = 7 * 8 // 2
  expected = 3 * (6 * (matrices + 11 * 4) * 7 + pairs * 2 * 2 * 6 * 2)
  assert metrics.train_flops(config, SharingPlan.dense(1), 3, 7) == expected


def test_known_and_stated_peaks(monkeypatch):
  device = type("Device", (), {"device_kind": "NVIDIA H100 80GB HBM3"})
  monkeypatch.setattr(metrics.jax, "devices", lambda: [device])
  assert metrics.peak_tflops(None) == 989.0
  assert metrics.peak_tflops(500.0) == 500.0
  device.device_kind = "cpu"
  assert metrics.peak_tflops(None) is None
