"""Measurements over virtual devices: what each has, what is told, what is refused."""

import functools
import math

import jax
import numpy as np
import pytest

from sa_jax.bench import Task, measure, ours
from sa_jax.cli import main
from sa_jax.config import PRESETS
from sa_jax.decode import Engine
from sa_jax.mesh import MeshSizes
from sa_jax.sharding import abstract_params, make_mesh, param_shardings
from tests import tiny

pytestmark = pytest.mark.slow

SHAPE = tiny.config(vocab_size=64, num_heads=8, num_kv_heads=4, mlp_dim=64)


@pytest.fixture
def preset(monkeypatch):
  monkeypatch.setitem(PRESETS, "tiny", SHAPE)
  monkeypatch.setattr(ours, "copy_bandwidth", functools.partial(measure.copy_bandwidth, 1e-4))
  monkeypatch.setattr(ours, "matrix_rate", functools.partial(measure.matrix_rate, 32))


def parts(tree):
  """How many times as large as what one device has of it each matrix is."""
  return {leaf.nbytes // leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim > 1}


def watched(monkeypatch, module, name):
  """The `parts` of everything that a function returns, as it returns: later it may be donated."""
  seen, function = set(), getattr(module, name)

  def call(*arguments, **options):
    result = function(*arguments, **options)
    seen.update(parts(result))
    return result

  monkeypatch.setattr(module, name, call)
  return seen


@pytest.mark.parametrize("tensor", [4])
def test_decode(preset, monkeypatch, caplog, tensor):
  params, states = watched(monkeypatch, ours, "random_tree"), watched(monkeypatch, Engine, "empty")
  caplog.set_level("INFO", "sa_jax")
  result = ours.decode(
    Task("decode", "tiny", "0:1", batch_size=2, length=64, layers=3, repeats=1, mesh=MeshSizes(1, tensor=tensor))
  )
  assert params == states == {tensor}
  # Once: the cache comes back split as it was given.
  assert sum("decode steps" in message for message in caplog.messages) == 1
  assert 0 < result.low <= result.seconds <= result.high < math.inf
  assert 0 < result.ceiling < math.inf
  assert (result.device, result.detail) == (f"{tensor} × cpu", f"cache 0.00 GB, tensor {tensor}")


def test_step(preset, monkeypatch):
  params, states = watched(monkeypatch, ours, "random_tree"), watched(monkeypatch, ours, "make_state")
  batches = watched(monkeypatch, jax, "device_put")
  sizes = {"fsdp": 2, "tensor": 2, "sequence": 2}
  result = ours.step(
    Task("step", "tiny", "0:1", batch_size=2, length=8, layers=2, repeats=1, mesh=MeshSizes(**{"data": 1} | sizes))
  )
  # Stacked norms are matrices too, which every device has whole.
  assert params == states == {1, 4}
  assert batches == {4}
  assert 0 < result.low <= result.seconds <= result.high < math.inf
  assert result.device == "8 × cpu"
  assert " a device), MFU 0.0 % of 8 × 989 TFLOP/s, remat full" in result.detail
  assert result.detail.endswith(", fsdp 2 × tensor 2 × sequence 2")


def test_random_parameters_are_the_same_on_any_mesh_and_nowhere_whole():
  model = tiny.model("0:1", num_layers=2, vocab_size=64)
  shapes, mesh = abstract_params(model), make_mesh(fsdp=8)
  shardings = param_shardings(model, mesh)
  whole, split = ours.random_tree(shapes), ours.random_tree(shapes, shardings)
  assert parts(split) == {1, 8}  # stacked norms, which are vectors, and all others
  jax.tree.map(np.testing.assert_array_equal, whole, split)
  fill = jax.jit(ours._normal, static_argnames=("shape", "dtype"), out_shardings=shardings["embed"]["embedding"])
  memory = fill.lower(jax.random.key(0), (1024, 64), "float32").compile().memory_analysis()
  assert memory.output_size_in_bytes == 4 * 1024 * 64 // 8
  assert memory.temp_size_in_bytes < 4 * 1024 * 64 // 2


def test_ceilings_are_of_all_devices_together(monkeypatch):
  """By a clock on which every call takes a second: four devices, each with as much to do as one alone."""
  held = []

  def timed(call, **_):
    held.append([shard.data.nbytes for shard in call().addressable_shards])
    return measure.Timing(1.0, 1.0, 1.0)

  monkeypatch.setattr(measure, "timed", timed)
  mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
  assert measure.matrix_rate(32, mesh) == 4 * measure.matrix_rate(32) == 4 * 2 * 32**3
  assert measure.copy_bandwidth(1e-4, mesh) == 4 * measure.copy_bandwidth(1e-4) == 4 * 8 * 2 * 1e5
  assert held == [4 * [2 * 32**2], [2 * 32**2], 4 * [100_000], [100_000]]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["prefill", "--mesh", "tensor=2"], "tensor (prefill runs on one device)"),
    (["decode", "--mesh", "fsdp=2,sequence=2"], "fsdp and sequence (decode takes tensor)"),
    (
      ["step", "--mesh", "fsdp=2", "--batch-size", "2", "--peers", "hf-eager"],
      "(the peer hf-eager runs on one device)",
    ),
    (
      ["step", "--mesh", "fsdp=2", "--batch-size", "3"],
      "--batch-size 3 (must be a multiple of data × fsdp = 2)",
    ),
    (["step", "--mesh", "sequence=3"], "--length 1024 (must be a multiple of sequence = 3)"),
    (["step", "--mesh", "slice=2"], "slice (step takes data, fsdp, expert, tensor, sequence)"),
    (["step", "--mesh", "tensor=0"], "tensor=0 (must be at least 1)"),
  ],
)
def test_meshes_that_cannot_be(capsys, flags, message):
  assert main(["bench", *flags]) == 2
  assert message in " ".join(capsys.readouterr().err.split())


def test_more_devices_than_there_are():
  with pytest.raises(ValueError, match="fsdp 1 × tensor 16 needs 16 devices; there are 8"):
    ours.mesh_of(Task("decode", "tiny", mesh=MeshSizes(1, tensor=16)))
