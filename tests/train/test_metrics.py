"""What a run counts."""

import math

from sa_jax import ModelConfig, SharingPlan
from sa_jax.train import metrics
from sa_jax.train.metrics import Clock, Window


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
